"""Trains a tagger of words, evaluates it on the test split and saves it ready for the Hub."""

from efficient_transformers.training.tasks.tag_tokens import main

if __name__ == "__main__":
    main()
