"""From rows of text to token ids with a mask: sources, formats, templates, tokenizer, encoding."""
