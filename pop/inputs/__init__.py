"""What goes into a model: tokenizers, chat formats, images, videos. May import: pop.models."""
