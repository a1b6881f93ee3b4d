"""From logits to text: sampling, batches, conversations, prefixes. May import: pop.engine and below, pop.inputs."""
