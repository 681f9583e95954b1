"""The mathematics of each optimizer: staged rules of pure functions over blocks of tensors."""
