"""One config over several seeds and lengths, and a table of the means: does the length pay?"""

from efficient_transformers.training.runs.seeds import main

if __name__ == "__main__":
    main()
