"""A CLIP of the transformers library: clean and robust accuracy on the bundled images or yours.

    pip install '.[hub]'                                  # in a checkout
    python hf_model.py                                    # openai/clip-vit-base-patch32, from the hub
    python hf_model.py path/to/folder imagefolder:photos  # as save_pretrained writes it, on your images

The command line does the same: robustvlm attack transformers:openai/clip-vit-base-patch32 --eps 1/255
"""

import sys

import robustvlm as rv


def main(name: str = "openai/clip-vit-base-patch32", data: str = "emoji", limit: int = 50, steps: int = 20) -> None:
    """Attack `limit` images and print what the attack left."""
    run = rv.attack(
        f"transformers:{name}", data=data, attack="pgd", steps=steps, eps="1/255", limit=limit, checks="quick"
    )
    clean, robust = run.summary.clean_accuracy, run.summary.at("1/255").robust_accuracy
    print(f"{clean.value:.1%} right, {robust.value:.1%} still right under attack; the report is {run.report}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
