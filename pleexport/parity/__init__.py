"""Does a bundle compute what the PyTorch original computes?"""
