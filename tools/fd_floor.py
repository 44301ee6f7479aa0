"""How FD-digits scores perfect samples: bootstraps of the real images against all of them."""

import argparse
import statistics

import torch

from dit_qat.dit.data import digit_images
from dit_qat.dit.evaluation import evaluate_digits
from dit_qat.dit.randomness import generator_for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1797)
    parser.add_argument("--repeats", type=int, default=200)
    arguments = parser.parse_args()
    images, _ = digit_images()
    scores = []
    for repeat in range(arguments.repeats):
        generator = generator_for(0, "floor", repeat)
        drawn = torch.randint(len(images), (arguments.samples,), generator=generator)
        scores.append(evaluate_digits(images[drawn])["fd_digits"])
    scores.sort()
    low, high = (scores[round(q * (len(scores) - 1))] for q in (0.05, 0.95))
    print(f"mean {statistics.mean(scores):.2f}, 5 % {low:.2f}, 95 % {high:.2f}")


if __name__ == "__main__":
    main()
