"""Raw text to tokens: readers, tokenizers, preprocessing."""
