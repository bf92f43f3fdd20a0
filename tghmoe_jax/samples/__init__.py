"""What a batch is made of: questions, tasks, prompts, tokeniser, augmentation and the order of the data."""
