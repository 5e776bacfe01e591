"""Publish a finished run as a folder of the zoo, rewrite its card, or check it."""

from efficient_transformers.training.runs.publish import main

if __name__ == "__main__":
    main()
