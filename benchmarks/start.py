"""Processor time until a command makes its first pass, against that of importing PyTorch and open_clip.

python -m benchmarks.start --repeats 3
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile

COMMANDS = {
    "attack": ["attack", "tiny", "--attack", "fgsm", "--eps", "1/255", "--limit", "4", "--device", "cpu"],
    "certify": ["certify", "tiny", "--sigma", "0.05", "--samples", "100", "--limit", "2", "--device", "cpu"],
    "evaluate": ["evaluate", "tiny", "--limit", "8", "--device", "cpu"],
    "detect": ["detect", "tiny", "--id", "emoji", "--ood", "emoji?split=far", "--limit", "8", "--device", "cpu"],
    "predict": ["predict", "tiny", "--data", "emoji", "--limit", "4", "--device", "cpu"],
}
MOST = 1.2
HEAVY = ("matplotlib", "pandas", "pyarrow.dataset", "scipy.stats", "scipy.optimize", "statsmodels", "sklearn")
"""Modules that a run needs at its end, if at all."""
_BARE = (
    "import torch, open_clip, resource; u = resource.getrusage(resource.RUSAGE_SELF); print(u.ru_utime + u.ru_stime)"
)


def main() -> None:
    """Start every command several times in turns with the bare imports; print a table, exit code 1 above the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--commands", default=",".join(COMMANDS))
    parser.add_argument("--until-first-pass", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.until_first_pass:
        _stop_at_first_pass(options.until_first_pass)
    from benchmarks.common import markdown  # which loads PyTorch

    names = options.commands.split(",")
    bare: list[float] = []
    spent: dict[str, list[float]] = {name: [] for name in names}
    loaded: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats):
            bare.append(float(_run(["-c", _BARE])))
            for name in names:
                place = [] if name in ("evaluate", "predict") else ["--out", f"{folder}/{repeat}"]
                command = ["-m", "benchmarks.start", "--until-first-pass", *COMMANDS[name], *place]
                seconds, _, modules = _run(command).strip().splitlines()[-1].partition(" ")
                spent[name].append(float(seconds))
                loaded[name] = modules
    base = statistics.median(bare)
    rows = [["import torch, open_clip", f"{base:.2f}", "1", ""]]
    rows += [[name, f"{(s := statistics.median(spent[name])):.2f}", f"{s / base:.2f}", loaded[name]] for name in names]
    print(markdown(("until the first pass of", "processor seconds, median", "ratio", "loaded of what can wait"), rows))
    if any(statistics.median(times) > MOST * base for times in spent.values()):
        sys.exit(1)


def _run(command: list[str]) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr}")
    return done.stdout


def _stop_at_first_pass(words: list[str]) -> None:
    """Run the program up to the first image that a network takes; print processor seconds and modules, and end."""

    class Watch:
        """Sees torch being imported, and asks it to say when a module is called on images."""

        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            del path, target
            # The last submodule that `import torch` asks for is not known, but open_clip comes after all of them.
            if name == "open_clip":
                from torch.nn.modules.module import register_module_forward_pre_hook

                register_module_forward_pre_hook(_end_if_image)

    sys.meta_path.insert(0, Watch())
    sys.argv = ["robustvlm", *words]
    from robustvlm.__main__ import run

    run()
    raise SystemExit("no image was asked about")


def _end_if_image(module: object, inputs: tuple[object, ...]) -> None:
    del module
    if inputs and getattr(inputs[0], "ndim", 0) == 4:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        print(usage.ru_utime + usage.ru_stime, *(name for name in HEAVY if name in sys.modules), flush=True)
        os._exit(0)


if __name__ == "__main__":
    main()
