"""A classifier of timm on your images: a folder for each class, named as the classifier's classes are.

    python timm_model.py resnet50.a1_in1k imagefolder:photos       # published weights
    python timm_model.py resnet50/mine.pt imagefolder:photos       # yours, with classes.txt beside the file

The command line does the same: robustvlm attack timm:resnet50.a1_in1k --data imagefolder:photos
"""

import sys

import robustvlm as rv


def main(name: str, data: str, limit: int = 50, steps: int = 20) -> None:
    """Attack `limit` images and print what the attack left."""
    run = rv.attack(f"timm:{name}", data=data, attack="pgd", steps=steps, eps="1/255", limit=limit, checks="quick")
    clean, robust = run.summary.clean_accuracy, run.summary.at("1/255").robust_accuracy
    print(f"{clean.value:.1%} right, {robust.value:.1%} still right under attack; the report is {run.report}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
