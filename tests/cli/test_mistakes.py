"""Every mistake ends in one line and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import OWN, Call

pytestmark = pytest.mark.usefixtures("own_place")

MISTAKES: dict[str, tuple[list[str], str]] = {
    "unknown model": (["attack", "tinny"], "unknown model 'tinny'; did you mean 'tiny'"),
    "unknown tag": (["attack", "ViT-B-32/laion2b_s34b_b79"], "did you mean 'laion2b_s34b_b79k'"),
    "architecture without weights": (["attack", "ViT-B-32"], "say which weights"),
    "missing checkpoint": (["attack", "ViT-B-32/best.safetensors"], "best.safetensors"),
    "missing module": (["attack", "no_such_module:Encoder"], "no module 'no_such_module'"),
    "missing callable": (["attack", "own_encoders:Meen"], "did you mean 'Mean'"),
    "incomplete encoder": (["attack", "own_encoders:Half", "--data", "imagefolder:photos"], "Half has no encode_image"),
    "encoder without gradient": (
        ["attack", "own_encoders:Detached", "--data", "imagefolder:photos"],
        "has no gradient",
    ),
    "coupled encoder": (["attack", "own_encoders:Coupled", "--data", "imagefolder:photos"], "--lanes 1"),
    "missing folder": (["attack", "--data", "imagefolder:nowhere"], "no folder nowhere"),
    "missing file": (["attack", "--data", "parquet:nowhere.parquet"], "no file nowhere.parquet"),
    "empty folder": (["attack", "--data", "imagefolder:empty"], "empty holds nothing"),
    "folder without images": (["attack", "--data", "imagefolder:no_images"], "has no image in a class folder"),
    "only corrupt images": (["attack", "own_encoders:Mean", "--data", "imagefolder:corrupt"], "none of its 2 images"),
    "one class": (["attack", "own_encoders:Mean", "--data", "imagefolder:one"], "at least 2 classes"),
    "unknown kind of data": (["attack", "--data", "imgfolder:photos"], "did you mean 'imagefolder'"),
    "missing column": (["attack", "--data", "parquet:numbers.parquet"], "no image column"),
    "broken parquet": (["attack", "--data", "parquet:broken.parquet"], "not a readable Parquet file"),
    "unknown data option": (["attack", "--data", "emoji?spilt=test"], "did you mean 'split'"),
    "unlabelled data": (["attack", "--data", "emoji?split=near", "--limit", "2"], "attacks need labelled images"),
    "unknown goal": (["attack", "--goal", "misclasify"], "did you mean 'misclassify'"),
    "goal without its level": (["attack", "--goal", "superclass"], "pass superclass:LEVEL"),
    "unknown level": (["attack", "--goal", "superclass:7"], "levels 0 (classes) to 2 below its root, got 7"),
    "level without a tree": ([*OWN, "--goal", "superclass:1"], "has no class tree"),
    "unknown target": (["attack", "--goal", "targeted:dolpin"], "did you mean 'dolphin'"),
    "refusal of a model that never refuses": (["attack", "--goal", "deny"], "pass for example 'tiny+reject:0.5'"),
    "missing target picture": (["attack", "--goal", "feature:gone.png"], "no picture at 'gone.png'"),
    "cosine out of range": (["attack", "--goal", "feature", "--min-cos", "1.5"], "--min-cos must lie between"),
    "cosine of no feature": (["attack", "--min-cos", "0.4"], "--min-cos is for --goal feature: leave it out"),
    "cosine of votes": (["certify", "--claim", "vote", "--min-cos", "0.7"], "--min-cos is not read by the claim"),
    "rank of a class": (["certify", "--claim", "class", "--top", "3"], "--top is not read by the claim 'class'"),
    "weight of no antibodies": (["certify", "--weight", "0.1"], "--weight is not read by the claim 'feature'"),
    "norm of no attack": (["detect", "--norm", "L7"], "--norm is for --under-attack: pass both"),
    "radius of no attack": (["detect", "--eps", "4/255"], "--eps is for --under-attack: pass both"),
    "attack that is not made": (["detect", "--attack", "pgdd"], "--attack is for --under-attack: pass both"),
    "images not attacked": (["detect", "--attack-limit", "8"], "--attack-limit is for --under-attack: pass both"),
    "norm of no validation": (["soup", "tiny", "tiny", "--norm", "L7"], "--norm is for --val, and there is none"),
    "steps of no validation": (["soup", "tiny", "tiny", "--val-steps", "3"], "--val-steps is for --val"),
    "choice that is not made": (["soup", "tiny", "tiny", "--by", "clean"], "--by is for --method greedy: pass both"),
    "weight of no terms": (["tune-prompts", "--no-ebm", "--lambda-ebm", "3"], "--lambda-ebm is the weight of the EBM"),
    "endpoint that is not asked": (["finetune", "--llm", "http://x/v1"], "--llm is for --tree llm: pass both"),
    "order of no tree": (["finetune", "--tree-by", "colour"], "--tree-by is for --tree llm: pass both"),
    "threshold that is no probability": (["attack", "tiny+reject:2"], "0 < T < 1"),
    "unknown images without refusal": (
        ["attack", "--goal", "intrude", "--limit", "2"],
        "needs a model that may refuse",
    ),
    "no draws": (["attack", "--eot", "0"], "--eot must be between 1 and"),
    "draws text": (["attack", "--draws", "many"], "Invalid value for '--draws'"),
    "classifier of other classes": (
        ["attack", "own_encoders:Ten", "--data", "imagefolder:photos"],
        "for 2 images and 2 classes",
    ),
    "eps zero": (["attack", "--eps", "0"], "--eps must be a positive number"),
    "eps negative": (["attack", "--eps", "-1/255"], "--eps must be a positive number, got '-1/255'"),
    "eps text": (["attack", "--eps", "small"], "--eps 'small' is no number"),
    "eps nan": (["attack", "--eps", "nan"], "--eps must be a positive number"),
    "eps in grey levels": (["attack", "--eps", "8"], "for 8 grey levels pass 8/255"),
    "unknown norm": (["attack", "--norm", "L7"], "expected Linf or L2"),
    "unknown attack": (["attack", "--attack", "pgdd"], "did you mean 'pgd'"),
    "attack twice": (["attack", "--attack", "pgd,pgd"], "stands twice"),
    "unknown attack option": (["attack", "--attack", "pgd:stepps=3"], "unknown option 'stepps=3'"),
    "attack option without number": (["attack", "--attack", "pgd:steps=many"], "expected a whole number, got 'many'"),
    "no steps": (["attack", "--steps", "0"], "steps must be between 1 and"),
    "no images": (["attack", "--limit", "0"], "--limit must be at least 1"),
    "limit text": (["attack", "--limit", "few"], "Invalid value for '--limit'"),
    "no lanes": (["attack", "--lanes", "0"], "--lanes must be at least 1"),
    "many lanes": (["attack", "--lanes", "9223372036854775808"], "--lanes must be at most 65,536"),
    "large seed": (["attack", "--seed", "9223372036854775808"], "--seed must be less than 2^63"),
    "large limit": (["attack", "--limit", "9223372036854775808"], "less than 2^63"),
    "many targets": (["attack", "--attack", "apgd-t:targets=1000"], "more targets than there are wrong classes"),
    "fgsm steps": (["attack", "--attack", "fgsm", "--steps", "-1"], "--steps must be between"),
    "judged by no draw": (["attack", "--draws", "0"], "--draws must be between"),
    "negative eot": (["attack", "--eot", "-3"], "--eot must be between"),
    "sixth processor": (["attack", "--device", "cpu:5"], "cpu is one device"),
    "radius twice": (["attack", "--eps", "1/255,1/255"], "name each radius once"),
    "L2 in grey levels": (["attack", "--norm", "L2", "--eps", "128"], "for grey levels pass 128/255"),
    "negative seed": (["attack", "--seed", "-1"], "--seed must not be negative"),
    "unknown device": (["attack", "--device", "tpu"], "pass auto, cpu, cuda"),
    "device without data": (["attack", "--device", "meta"], "pass auto, cpu, cuda"),
    "device without 64 bits": (["attack", "--device", "mps"], "'mps' has no 64-bit numbers"),
    "certificate without 64 bits": (["certify", "--device", "mps"], "pass cpu or cuda"),
    "missing device": (["attack", "--device", "cuda:99"], "is not there"),
    "unknown precision": (["attack", "--precision", "fp8"], "unknown precision 'fp8'"),
    "tiny resolution": (["attack", "--resolution", "4"], "between 8 and 4096"),
    "name that leads out": (["attack", "--name", "../x"], "the run name '../x' is not allowed"),
    "tree with a cycle": ([*OWN, "--tree", "cycle.csv"], "the tree has a cycle"),
    "missing tree": ([*OWN, "--tree", "nowhere.json"], "no tree file at nowhere.json"),
    "too few class names": ([*OWN, "--classes", "names1.txt"], "2 classes"),
    "template without place": ([*OWN, "--templates", "prompts.txt"], "lacks {}"),
    "nothing to resume": ([*OWN, "--resume"], "no run to resume"),
    "bad condition": ([*OWN, "--fail-if", "asr is high"], "cannot read the condition"),
    "condition never true": ([*OWN, "--fail-if", "asr>50"], "for per cent write asr>50%"),
    "output that is a file": ([*OWN, "--out", "file"], "choose another folder with --out"),
    "unknown option": (["attack", "--stepz", "3"], "--stepz"),
    "unknown command": (["atack"], "attack"),
    "surplus argument": (["attack", "tiny", "emoji"], "emoji"),
    "unknown run": (["report", "nothing"], "no run 'nothing'"),
    "folder that is no run": (["report", "photos"], "is no run folder"),
    "evaluate an unknown model": (["evaluate", "tinny"], "did you mean 'tiny'"),
    "unknown data to look at": (["data", "photos"], "did you mean 'imagefolder:photos'"),
    "unknown name of a model": (["models", "--filter", "tinny"], "did you mean 'tiny'"),
}


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_ends_in_one_line(call: Call, kind: str) -> None:
    arguments, said = MISTAKES[kind]
    ended = call(*arguments)
    assert ended.code == 2
    lines = [line for line in ended.err.splitlines() if line.strip()]
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("error: ")
    assert said in lines[0]
    assert "Traceback" not in ended.out + ended.err


def test_changed_settings_under_a_name_are_refused_by_key(call: Call, place: Path) -> None:
    assert call(*OWN, "--name", "mine").code == 0
    rows = (place / "runs" / "mine" / "results.parquet").read_bytes()
    ended = call(*OWN, "--name", "mine", "--seed", "5", "--eps", "1/255")
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert "seed: 0 -> 5" in ended.err
    assert "eps_text: ['2/255'] -> ['1/255']" in ended.err
    assert (place / "runs" / "mine" / "results.parquet").read_bytes() == rows
    assert call(*OWN, "--name", "mine", "--seed", "5", "--fresh").code == 0
