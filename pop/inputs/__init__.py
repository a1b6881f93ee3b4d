"""The inputs of a model: texts, conversations, images and videos become token ids and tensors.

It may import pop.models, pop.system and pop.errors.
"""
