"""python src/ship.py RUN NAME: the best weights of a run, rounded, as a model that ships with the package."""

from gfrnn.training.ship import main

if __name__ == "__main__":
    main()
