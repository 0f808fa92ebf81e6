"""Training of drafters: the target writes its own texts, its hidden states are cached, a method learns from them."""
