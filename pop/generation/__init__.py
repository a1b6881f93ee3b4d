"""From logits to text: sampling, batches of prompts, conversations, and prefixes that many prompts share.

May import pop.runner, pop.engine and what lies below it, and pop.inputs. A model comes in as an argument.
"""
