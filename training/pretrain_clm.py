"""Trains a causal language model, new or from a checkpoint, evaluates it on the test split and saves it for the Hub."""

from efficient_transformers.training.tasks.pretrain_clm import main

if __name__ == "__main__":
    main()
