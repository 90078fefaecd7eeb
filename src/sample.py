"""python src/sample.py RUN --prompt TEXT: continue a text."""

from gfrnn.training.sample import main

if __name__ == "__main__":
    main()
