"""How PyTorch, Hugging Face and existing models reach the kernels, without an edit of the model."""
