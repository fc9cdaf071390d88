"""Made by tools/library_stub.py: the names of the library with their types."""

from pathlib import Path

from robustvlm.attacks.base import ATTACKS as ATTACKS
from robustvlm.attacks.perturb import AutoAttack as AutoAttack
from robustvlm.attacks.perturb import Perturbed as Perturbed
from robustvlm.attacks.perturb import perturb as perturb
from robustvlm.attacks.threat import ThreatModel as ThreatModel
from robustvlm.commands import open_run as open_run
from robustvlm.commands.assemble.work import Pipeline
from robustvlm.commands.attack.compare import compare as compare
from robustvlm.commands.attack.record import AttackedRun
from robustvlm.commands.certify.record import CertifyRecord
from robustvlm.commands.detect.view import DetectRecord
from robustvlm.commands.evaluate.view import Evaluation
from robustvlm.commands.export import export as export
from robustvlm.commands.immunize.record import ImmunizeSummary
from robustvlm.commands.judge.record import Judgement
from robustvlm.commands.predict import predict as predict
from robustvlm.commands.prompts.work import PromptRecord
from robustvlm.commands.soup.work import Soup
from robustvlm.core.registry import CallableModule
from robustvlm.data.specs import open_data as open_data
from robustvlm.defenses.load import load_classifier as load_classifier
from robustvlm.defenses.load import load_model as load_model
from robustvlm.defenses.votes import ABSTAIN as ABSTAIN
from robustvlm.defenses.votes import Smoothed as Smoothed
from robustvlm.defenses.votes import certify_tensors as certify_tensors
from robustvlm.detect.catalog import SCORES as SCORES
from robustvlm.errors import UserError as UserError
from robustvlm.report.training import TrainingSummary
from robustvlm.runs.run import FinishedRun
from robustvlm.runs.settings import Observer

__version__: str

def attack(
    model: str | object = "tiny",
    *,
    data: str | object = "emoji",
    classes: Path | str | None = None,
    templates: Path | str | None = None,
    tree: Path | str | None = None,
    goal: str = "misclassify",
    min_cos: float = 0.5,
    attack: str = "apgd-ce,apgd-t",
    second_opinion: str | None = None,
    norm: str = "Linf",
    eps: str | float | None = None,
    steps: int | None = None,
    restarts: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    lanes: int | None = None,
    device: str = "auto",
    precision: str = "fp32",
    eot: int | None = None,
    draws: int | None = None,
    compiled: bool = False,
    resolution: int | None = None,
    out: Path | str = Path("runs"),
    name: str | None = None,
    resume: bool | None = None,
    track: str | None = None,
    budget: str | None = None,
    save_adversarial: bool = False,
    checks: str = "full",
    observer: Observer | None = None,
) -> AttackedRun:
    """Attack a model on labelled images, as `robustvlm attack` does; options by their names.

    In place of a spec, `model` may be a classifier of `load_classifier` or a module of yours from pixels to logits
    (with an `image_size`), and `data` a source of `open_data`; the record names them, with their fingerprints.

    Returns:
        The run: its `summary` with exact 95 % intervals, its `rows` (an Arrow table, one row an image, attack and
        eps), and where its `report` is.

    Raises:
        UserError: whatever is wrong with the options, the data or the model.

    Example:
        >>> import tempfile
        >>> run = attack("tiny", attack="pgd", steps=2, limit=4, lanes=4, checks="none", out=tempfile.mkdtemp())
        >>> run.summary.images.evaluated, run.summary.at("2/255").robust_accuracy.total
        (4, 4)

    Args:
        model: tiny (bundled), NAME/PRETRAINED or NAME/FILE (open_clip), hf-hub:ORG/NAME, transformers:NAME,
            mllm:NAME, a folder, or module:callable (an encoder or a classifier); defences follow as +smooth:0.25 or
            +reject:0.5.
        data: emoji (bundled), imagefolder:DIR, parquet:FILE, torchvision:NAME:ROOT, hf:NAME or wds:URL.
        classes: File of class names, one per line or a JSON list.
        templates: File of prompt templates, one per line with {}.
        tree: File of the class tree (JSON, YAML or CSV).
        goal: misclassify; superclass:LEVEL, :all (one perturbation for all levels) or :matrix; targeted:CLASS;
            deny, intrude (models that may refuse); feature, feature:FILE.png or feature:TEXT; unsay,
            unsay:features, say:TEXT, match:FILE.png or reword (models that answer in words; docs/mllm.md has their
            ways).
        min_cos: --goal feature is reached below this cosine to the clean feature.
        attack: Attacks in order, each optionally with its own settings, e.g. apgd-ce,apgd-t or
            pgd:steps=40:objective=dlr; the plans standard, plus, rand and fare; torchattacks:NAME and
            autoattack[:VERSION] run those packages.
        second_opinion: Let another program attack the images again that withstood, and report what only it breaks:
            autoattack, autoattack:plus, torchattacks:NAME.
        norm: Linf or L2, in pixels scaled to [0, 1].
        eps: Radius, or radii for a security curve: 1/255,2/255 [default: 2/255; L2: 0.5].
        steps: Gradient steps [default: pgd 20, apgd 100].
        restarts: Random restarts [default: 1].
        limit: Attack this many images, chosen by a hash of their ids.
        seed: Seed of every random draw.
        lanes: Images attacked side by side in one batch [default: 64; GPU: 256].
        device: auto, cpu, cuda, cuda:1, ...
        precision: fp32; bf16 (gradients only, successes confirmed in fp32); fp64.
        eot: Draws of a random model averaged in every gradient [default: 10; 1 if not random].
        draws: Fresh draws of a random model that judge a success by majority [default: 21; 1 if not random].
        compiled: Take gradients from a torch.compile'd copy; the plain model confirms.
        resolution: Side in pixels of the image that is perturbed [default: the model's].
        out: Folder that holds the runs.
        name: Name of the run [default: made from the settings, so that they find it again].
        resume: Insist on an earlier run, or delete it. Default: continue if there is one.
        track: Log the finished run's numbers, curves and tables too: tensorboard, mlflow or wandb.
        budget: Stop when it is spent, with bounds on what is not decided: 20000passes (over all sessions), 90s,
            10min or 2h (of this session). Repeat the command with more, or without, to go on.
        save_adversarial: Keep every successful adversarial image (safetensors).
        checks: Checks of the evaluation itself: full (with extra attacks on 32 images), quick or none.
        observer: told of the progress.
    """

def build(
    encoder: str = "tiny",
    *,
    purify: str | None = None,
    smooth: str | None = None,
    immunize: str | None = None,
    accept_misfits: bool = False,
    device: str = "auto",
    out: Path | str = Path("runs"),
    name: str | None = None,
    fresh: bool = False,
    observer: Observer | None = None,
) -> FinishedRun[Pipeline]:
    """Put a pipeline together, as `robustvlm build` does; options by their names. The run's folder is a model spec.

    Given again, it copies the parts anew.

    Raises:
        UserError: a part is missing, of another kind, or made for another model; nothing to build.

    Example:
        >>> import tempfile
        >>> build("tiny", smooth="0.25:8", out=tempfile.mkdtemp()).summary.parts
        ['encoder tiny', 'smoothing 0.25:8']

    Args:
        encoder: The encoder: any model without operators, such as the run of a fine-tuning.
        purify: A run of `robustvlm purify`: purifier and mapper.
        smooth: Noise level, samples, and the alpha at which the model abstains, SIGMA[:N0[:ALPHA[:vote]]], as
            0.25:64:0.001.
        immunize: A run of `robustvlm immunize`: adapter, head and thresholds.
        accept_misfits: Put parts together that were made for other models.
        device: auto, cpu, cuda, cuda:1, ...
        out: Folder that holds the runs.
        name: Name of the pipeline [default: made from the settings].
        fresh: Delete an earlier pipeline of that name.
        observer: told of the progress.
    """

class _Certify(CallableModule[CertifyRecord]):
    def __call__(
        self,
        model: str = "tiny",
        *,
        data: str = "emoji",
        classes: Path | str | None = None,
        templates: Path | str | None = None,
        tree: Path | str | None = None,
        claim: str | None = None,
        threat: str | None = None,
        sigma: float | None = None,
        samples: int = 10000,
        alpha: float | None = None,
        min_cos: float = 0.5,
        radius: float | None = None,
        at: str | None = None,
        tau: float | None = None,
        antibodies: Path | str | None = None,
        weight: float = 0.5,
        paraphrases: str | None = None,
        words: int | None = None,
        top: int = 5,
        gallery: str | None = None,
        deployed: int | None = None,
        cache: str | None = None,
        from_cache: str | None = None,
        prompts: str | None = None,
        candidates: Path | str | None = None,
        limit: int | None = None,
        seed: int = 0,
        lanes: int | None = None,
        device: str = "auto",
        precision: str = "fp32",
        out: Path | str = Path("runs"),
        name: str | None = None,
        resume: bool | None = None,
        track: str | None = None,
        observer: Observer | None = None,
    ) -> CertifyRecord:
        """Certify a smoothed model, as `robustvlm certify` does; options by their names. Also `robustvlm.certify(...)`.

        Radii are l2 distances in the pixels that the noise is added to, in [0, 1], or in the unit of the `threat`. Each
        image's certificate is false with probability at most `alpha`.

        Raises:
            UserError: whatever is wrong with the options, the data or the model; settings that can certify nothing.

        Example:
            >>> import tempfile
            >>> found = certify("tiny", claim="class", sigma=0.05, samples=200, limit=2, out=tempfile.mkdtemp())
            >>> found.summary.images, found.rows.column("radius").to_numpy().shape
            (2, (2,))

        Args:
            model: Any model (`robustvlm models` lists the forms); of MODEL+smooth:SIGMA the smoothing is certified.
            data: The images; `robustvlm data` lists the forms.
            classes: File of class names, one per line or a JSON list.
            templates: File of prompt templates, one per line with {}.
            tree: File of the class tree (JSON, YAML or CSV).
            claim: feature (cosine to the smoothed clean feature), joint (the same, another bound), tokens (of each
                image token of a multimodal model), class (of the mean feature), vote (hard vote, another rule), named
                (by most free answers of a model that answers in words), topk (among the classes with most votes),
                recall (among the texts or images nearest to the mean feature), openset (accepted or rejected), open-
                vote (a class or none of them, by votes of an immunised model), or module:callable of your own [default:
                what a model that abstains answers by, else feature; with --from-cache: class].
            threat: What images may do: l2 (any change of pixels), 8bit (l2 between images of whole numbers, sound in
                floating point), l1, ellipsoid@SCALES (of channels, as 1,1,2, or a map in a file), spectrum@SCALES (of
                bands of spatial frequency), brightness, contrast, light (both), gamma, colour, translation, rotation
                (every angle of a range, by l2 noise; vote); radii are in its unit [default: that of
                MODEL+smooth:THREAT=SIGMA, else l2].
            sigma: Noise level, in pixels scaled to [0, 1] or the unit of the threat [default: 0.25, by threat].
            samples: Noisy copies per image, at most.
            alpha: Probability that an image's certificate is false, at most [default: 0.001; with --from-cache that of
                the run].
            min_cos: Cosine to certify (feature claims).
            radius: Decide only whether this radius is certified, with as few samples as that takes.
            at: Radii to count images at, as 0.1,0.25 [default: by sigma].
            tau: Threshold of the score, from other images (openset); in place of the model's own.
            antibodies: File of names to score against (openset).
            weight: Weight of the antibodies (openset).
            paraphrases: Certify the class for all wordings at once (class, vote): templates (each by itself, and their
                mean), or a file of lines CLASS: TEXT, any of which a class may be written with.
            words: Certify that the class stays though so many words of the prompts are changed too: each noisy copy
                reads one of the wordings of --paraphrases (vote).
            top: How many classes or texts it may be among (topk, recall).
            gallery: Data whose images are searched in place of texts: one of the image's class stays near (recall).
            deployed: Also certify what this many fresh copies keep [default: N0 of MODEL+smooth:SIGMA:N0].
            cache: Keep the noisy features as float16 or float32, to certify other prompts later.
            from_cache: A run made with --cache: certify --classes by text passes only.
            prompts: With --from-cache: independent if the prompts were fixed without looking at what the features gave,
                else adaptive (the default, valid always, smaller radii).
            candidates: With --from-cache: file of names fixed without looking, from which --classes is drawn at any
                time (class; larger radii than adaptive).
            limit: Certify this many images, chosen by a hash of their ids.
            seed: Seed of the noise.
            lanes: Noisy images per batch [default: 128; GPU: 512].
            device: auto, cpu, cuda, cuda:1, ...
            precision: fp32, bf16 or fp64: part of the encoder that is certified, to be deployed alike.
            out: Folder that holds the runs.
            name: Name of the run [default: made from the settings, so that they find it again].
            resume: Insist on an earlier run, or delete it. Default: continue if there is one.
            track: Log the finished run's numbers, curves and tables too: tensorboard, mlflow or wandb.
            observer: told of the progress.
        """

certify: _Certify

class _Detect(CallableModule[DetectRecord]):
    def __call__(
        self,
        model: str = "tiny",
        *,
        id: str | None = None,
        ood: list[str] | str = [],
        fit: str | None = None,
        stream: str | None = None,
        scores: str = "all",
        words: Path | str | None = None,
        oracle_words: bool = False,
        temperature: float = 1.0,
        classes: Path | str | None = None,
        templates: Path | str | None = None,
        tree: Path | str | None = None,
        limit: int | None = None,
        fit_limit: int | None = None,
        corrupt: str | None = None,
        promise: str | None = None,
        draws: int = 1000,
        seed: int = 0,
        batch_size: int = 64,
        device: str = "auto",
        under_attack: bool = False,
        attack_scores: str | None = None,
        attack: str = "pgd,apgd-ce:steps=40",
        norm: str = "Linf",
        eps: str | float | None = None,
        attack_limit: int = 64,
        lanes: int = 64,
        out: Path | str = Path("runs"),
        name: str | None = None,
        resume: bool | None = None,
        track: str | None = None,
        observer: Observer | None = None,
    ) -> DetectRecord:
        """Score known and unknown images, clean and under attack, as `robustvlm detect` does; options by their names.

        It is what `robustvlm.detect` does when it is called; the run returned has the rows of all images too.

        Raises:
            UserError: whatever is wrong with the options, the data or the model.

        Example:
            >>> import tempfile
            >>> run = detect("tiny", limit=8, scores="mcm", draws=100, fit="none", out=tempfile.mkdtemp())
            >>> [at.unknown for at in run.summary.scores[0].on]
            ['near', 'far']

        Args:
            model: Any model (`robustvlm models` lists the forms); one that may refuse also shows its own acceptance
                score.
            id: Images of the known classes [default: emoji].
            ood: Images of no known class, as DATA or NAME=DATA; once for each set [default: near and far emoji].
            fit: Images of the known classes to learn from, or none [default: none; the training styles for the bundled
                data].
            stream: Unlabelled images, known and unknown, that came in before those that are judged; adaneg remembers
                them.
            scores: all, or a list such as mcm,energy,knn (docs/detect.md lists them); own shows a model's own alone.
            words: File of words outside the known classes [default: the bundled class trees].
            oracle_words: Keep words that name a class of an unknown set: scores from words are then oracles, and the
                report says so.
            temperature: Temperature of the scores from energies: they divide the logits by it; 1 is the model's own.
            classes: File of class names, one per line or a JSON list.
            templates: File of prompt templates, one per line with {}.
            tree: File of the class tree (JSON, YAML or CSV).
            limit: Score this many images of each set, chosen by a hash of their ids.
            fit_limit: Learn from this many images, chosen likewise.
            corrupt: Also score the known images under common corruptions: all, or NAME[:SEVERITY] with commas between.
            promise: Also turn every score into a rule that answers only where it is right as often as this: 0.9, or
                0.9:class for the answers of each class.
            draws: Bootstrap samples for intervals and comparisons.
            seed: Seed of every random draw.
            batch_size: Images per encoder pass.
            device: auto, cpu, cuda, cuda:1, ...
            under_attack: Also attack the scores: unknown images to be accepted, known ones refused.
            attack_scores: Scores to attack, and own for a model's own [default: own, mcm, energy, mahalanobis, as far
                as there].
            attack: Attacks of --under-attack; objectives do not matter, all climb the acceptance margin.
            norm: Norm of the attacks: Linf or L2, in pixels scaled to [0, 1].
            eps: Radius of the attacks [default: 2/255; L2: 0.5].
            attack_limit: Images of each set that are attacked.
            lanes: Images attacked side by side in one batch.
            out: Folder that holds the runs.
            name: Name of the run [default: made from the settings, so that they find it again].
            resume: Insist on an earlier run, or delete it. Default: continue if there is one.
            track: Log the finished run's numbers, curves and tables too: tensorboard, mlflow or wandb.
            observer: told of the progress.
        """

detect: _Detect

def evaluate(
    model: str = "tiny",
    *,
    data: str = "emoji",
    classes: Path | str | None = None,
    templates: Path | str | None = None,
    tree: Path | str | None = None,
    limit: int | None = None,
    corrupt: str | None = None,
    batch_size: int = 64,
    device: str = "auto",
    out: Path | str = Path("runs"),
    name: str | None = None,
    resume: bool | None = None,
    track: str | None = None,
    observer: Observer | None = None,
) -> Evaluation:
    """Evaluate a model without an attack, as `robustvlm evaluate` does; options by their names.

    The run that is returned has the numbers of its summary as attributes too, as `run.accuracy`.

    Raises:
        UserError: whatever is wrong with the options, the data or the model.

    Example:
        >>> import tempfile
        >>> run = evaluate("tiny", limit=8, out=tempfile.mkdtemp())
        >>> run.images, run.rows.num_rows
        (8, 8)

    Args:
        model: The model; `robustvlm models` lists the forms.
        data: The images; `robustvlm data` lists the forms.
        classes: File of class names, one per line or a JSON list.
        templates: File of prompt templates, one per line with {}.
        tree: File of the class tree (JSON, YAML or CSV).
        limit: Evaluate this many images, a fixed selection.
        corrupt: Also under common corruptions: all, or NAME[:SEVERITY] with commas between, as fog:3,snow;
            severities 1 to 5.
        batch_size: Images per pass.
        device: auto, cpu, cuda, cuda:1, ...
        out: Folder that holds the runs.
        name: Name of the run [default: made from the settings, so that they find it again].
        resume: Insist on an earlier run, or delete it. Default: continue if there is one.
        track: Log the finished run's numbers, curves and tables too: tensorboard, mlflow or wandb.
        observer: told of the progress.
    """

def finetune(
    model: str = "tiny",
    *,
    method: str = "hierarchical",
    teacher: str | None = None,
    data: str = "emoji?split=train",
    val: str | None = None,
    classes: Path | str | None = None,
    templates: Path | str | None = None,
    tree: list[str] | str = [],
    tree_by: list[str] | str = [],
    llm: str | None = None,
    llm_model: str | None = None,
    norm: str = "Linf",
    eps: str | float | None = None,
    alpha: str | float | None = None,
    inner_steps: int = 3,
    curvature: float | None = None,
    option: list[str] | str = [],
    trainable: str = "all",
    augment: str = "crop",
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 128,
    accumulate: int = 1,
    lr: float | None = None,
    warmup: float = 0.05,
    weight_decay: float = 0.0001,
    clip: float = 1.0,
    precision: str = "fp32",
    ema: float | None = None,
    compile: bool = False,
    gradient_checkpointing: bool = False,
    limit: int | None = None,
    val_limit: int = 512,
    val_steps: int = 10,
    validate_every: float = 0.1,
    checkpoint_every: int = 0,
    seed: int = 0,
    device: str = "auto",
    out: Path | str = Path("runs"),
    name: str | None = None,
    resume: bool | None = None,
    track: str | None = None,
    observer: Observer | None = None,
) -> FinishedRun[TrainingSummary]:
    """Fine-tune a model against attacks, as `robustvlm finetune` does; options by their names.

    The folder of the run returned is a model spec, to be attacked, say.

    Raises:
        UserError: whatever is wrong with the options, the data or the model.

    Example:
        >>> import tempfile
        >>> short = {"limit": 40, "val_limit": 4, "val_steps": 1, "inner_steps": 1, "steps": 1, "batch_size": 2}
        >>> finetune("tiny", method="tecoa", out=tempfile.mkdtemp(), **short).summary.steps
        1

    Args:
        model: The model to start from; `robustvlm models` lists the forms.
        method: hierarchical (needs a class tree), tecoa, fare, pmg, simclip, agft, ucat, distill, or clean (the
            control: no attack). fare, simclip and agft learn without labels; those of the images to validate on, if
            there are any, choose the step.
        teacher: The model that distill learns from [default: the model itself, before training].
        data: Images to train on; `robustvlm data` lists the forms.
        val: Images to validate on [default: a tenth of the data, at most 512, held out].
        classes: File of class names, one per line or a JSON list.
        templates: File of prompt templates, one per line with {}.
        tree: File of a class tree (JSON, YAML or CSV), wordnet, or llm (by the language model of --llm); repeat it
            for a forest [default: the data's own].
        tree_by: What --tree llm sorts by, repeatable [default: kind of thing].
        llm: OpenAI-compatible endpoint for --tree llm.
        llm_model: The language model there.
        norm: Linf or L2, of the inner attack and of validations.
        eps: Radius, of the inner attack and of validations [default: 1/255; L2: 0.5].
        alpha: Step of the inner attack [default: 2.5 eps / (steps + 1)].
        inner_steps: Gradient steps of the inner attack.
        curvature: Of the hyperbolic space (hierarchical) [default: 1].
        option: An option of the method, NAME=VALUE; may be repeated. hierarchical: depth, temperature, negatives,
            leaf_only, per_level, eps_text, vicinity, vicinity_radius, norm_order, norm_gap, train_texts; pmg:
            general, clean, reverse; agft: scale, ratio; ucat: weight, temperature; distill: labels, features.
        trainable: all (the vision tower), lora, lora:RANK, ssf, or last:N (its last N blocks).
        augment: none, flip, crop (and flip) or strong (colours too).
        steps: Optimiser steps [default: 2 epochs].
        epochs: Passes over the images, in place of steps.
        batch_size: Images per step, over all processes.
        accumulate: Parts that a batch is cut into, to save memory.
        lr: Peak learning rate [default: 1e-5; lora and ssf: 1e-3].
        warmup: Steps of warm-up; below 1, a share of all steps.
        weight_decay: Of matrices and filters.
        clip: Largest norm of the gradient.
        precision: fp32, or bf16 (weights and perturbations stay fp32).
        ema: Decay of a moving average of the weights, which is then kept, such as 0.999.
        compile: Compile the vision tower (torch.compile).
        gradient_checkpointing: Trade time for memory, where the tower offers it.
        limit: Use this many images, chosen by a hash of their ids.
        val_limit: Validate on at most this many images.
        val_steps: PGD steps of a validation.
        validate_every: In steps; below 1, a share of all; 0: at the end only.
        checkpoint_every: In steps [default: every five minutes].
        seed: Seed of every random draw.
        device: auto, cpu, cuda, cuda:1, ...
        out: Folder that holds the runs.
        name: Name of the run [default: made from the settings, so that they find it again].
        resume: Insist on an earlier run, or delete it. Default: continue if there is one.
        track: Log the finished run's numbers, curves and tables too: tensorboard, mlflow or wandb.
        observer: told of the progress.
    """

def immunize(
    model: str = "tiny",
    *,
    data: str = "emoji?split=train",
    held_out: str | float | None = None,
    classes: Path | str | None = None,
    templates: Path | str | None = None,
    tree: Path | str | None = None,
    no_images: bool = False,
    calibrate: str | None = None,
    shots: int = 0,
    antibodies: str = "bank",
    llm: str | None = None,
    llm_model: str | None = None,
    llm_prices: str | None = None,
    xi: str | float | None = "auto",
    prototypes_per_class: int = 1,
    band: str | None = None,
    margin: str | float | None = "0.2",
    push_weight: float = 1.0,
    push_nearest: int = 10,
    mix_weight: float = 0.0,
    rule: str = "hinge",
    lambda_inf: float = 0.5,
    kappa: str = "model",
    miss: float = 0.05,
    min_images: int = 30,
    thresholds: str = "equal-miss",
    tail: str | float | None = "auto",
    sigma: list[float] | float = [],
    hidden: int = 128,
    steps: int = 400,
    lr: float = 0.0003,
    decay: float = 0.1,
    ood: list[str] | str = [],
    oracle_words: bool = False,
    near_names: Path | str | None = None,
    add_class: str | None = None,
    seed: int = 0,
    device: str = "auto",
    out: Path | str = Path("runs"),
    name: str | None = None,
    fresh: bool = False,
    track: str | None = None,
    observer: Observer | None = None,
) -> FinishedRun[ImmunizeSummary]:
    """Immunise a model, as `robustvlm immunize` does; options by their names. The run's folder is a model spec.

    Raises:
        UserError: whatever is wrong with the options, the data or the model.

    Example:
        >>> import tempfile
        >>> few = {"data": "emoji?split=train&styles=noto,fxemoji&copies=1", "steps": 10, "min_images": 5}
        >>> len(immunize("tiny", out=tempfile.mkdtemp(), **few).summary.classes)
        101

    Args:
        model: Any model without smoothing; with --add-class, a run.
        data: Labelled images to learn from; `robustvlm data` lists the forms.
        held_out: Data, or a share of --data, that sets the thresholds [default: emoji?split=val&copies=8 for the
            bundled data, else 0.2].
        classes: File of class names, one per line or a JSON list.
        templates: File of prompt templates, one per line with {}.
        tree: Class tree: superclasses are no antibodies.
        no_images: From texts alone: no adapter; thresholds at 0 without --calibrate.
        calibrate: With --no-images: labelled images of known classes that set score and thresholds.
        shots: Images of each class to learn from; 0 for all.
        antibodies: bank (bundled), a file, llm, wordnet, noise (baseline), none.
        llm: OpenAI-compatible endpoint, as http://localhost:11434/v1; the key is read from ROBUSTVLM_LLM_KEY or
            OPENAI_API_KEY.
        llm_model: Model to ask at that endpoint.
        llm_prices: Price of a million tokens, to show what was spent.
        xi: Largest angle of a prototype to its text, degrees; auto: an eighth of the median.
        prototypes_per_class: Prototypes of each class.
        band: Cosines SAFE,RISK that antibodies lie between; either may be auto [default: auto,auto].
        margin: Cosine of image and antibody above which they are pushed apart; auto takes it from the data.
        push_weight: Weight of pushing from antibodies (lambda).
        push_nearest: Push an image from so many of its nearest antibodies; 0 for all.
        mix_weight: Weight of being unsure between images and antibodies (MixOE); 0 for none.
        rule: Score: hinge, the largest cosine less what an antibody near the image takes off, its weight chosen on
            the held-out images; or s-dis, with --lambda-inf.
        lambda_inf: Weight of antibodies in S_DIS (--rule s-dis).
        kappa: Concentration in training: model (its temperature) or class (vMF estimates).
        miss: Share of known images, classified right, that thresholds reject.
        min_images: Held-out images, classified right, that a threshold of its own needs.
        thresholds: equal-miss, density (classes of few images by the names around theirs), pooled (one), or least-
            fpr.
        tail: Share of the scores, the lowest, that thresholds are fitted to; auto: a fifth, and at least 20 images.
        sigma: Also set thresholds behind noise, for certify and +smooth; repeatable.
        hidden: Width of the adapter.
        steps: Training steps of the adapter, at most; 0 for none.
        lr: Learning rate of the adapter.
        decay: Weight of ||theta||^2 (eta).
        ood: Unknown images to measure on, DATA or NAME=DATA; may be repeated.
        oracle_words: Keep antibodies that name a class of an --ood set: figures on it are then those of an oracle,
            and say so.
        near_names: File of names of near things, to measure the antibodies' coverage.
        add_class: Add this class to the run MODEL, from its images in --data; the result is a new run.
        seed: Seed of every random draw.
        device: auto, cpu, cuda, cuda:1, ...
        out: Folder that holds the runs.
        name: Name of the run [default: made from the settings, so that they find it again].
        fresh: Delete an earlier run of this name first.
        track: Log the finished run's numbers, curves and tables too: tensorboard, mlflow or wandb.
        observer: told of the progress.
    """

def judge(
    model: str = "tiny+clipure,tiny+bits:3",
    *,
    base: str | None = None,
    data: str = "emoji",
    classes: Path | str | None = None,
    templates: Path | str | None = None,
    norm: str = "Linf",
    eps: str | float | None = None,
    steps: int = 100,
    queries: int = 300,
    targets: int = 9,
    limit: int = 100,
    seed: int = 0,
    lanes: int = 32,
    eot: int | None = None,
    draws: int = 21,
    every_mode: bool = False,
    device: str = "auto",
    out: Path | str = Path("runs"),
    name: str | None = None,
    resume: bool | None = None,
    track: str | None = None,
    observer: Observer | None = None,
) -> FinishedRun[Judgement]:
    """Judge test-time defences, as `robustvlm judge` does; options by their names.

    Returns:
        The run: its `summary` has an entry for each defended model and for what it stands on, with every image's
            fate.

    Raises:
        UserError: whatever is wrong with the options, the data or the models.

    Example:
        >>> import tempfile
        >>> run = judge("tiny+bits:3", limit=2, steps=1, queries=0, out=tempfile.mkdtemp())
        >>> [found.spec for found in run.summary.models]
        ['tiny', 'tiny+bits:3']

    Args:
        model: Defended models, with commas between them: MODEL+DEFENCE[,MODEL+DEFENCE...]; `robustvlm models` lists
            the defences.
        base: The undefended model, where it cannot be told from the name, as of module:callable.
        data: The images; `robustvlm data` lists the forms.
        classes: File of class names, one per line or a JSON list.
        templates: File of prompt templates, one per line with {}.
        norm: Linf or L2, in pixels scaled to [0, 1].
        eps: The radius [default: 4/255; L2: 0.5].
        steps: Gradient steps of every attack.
        queries: Queries of Square on what is left; 0 to leave it out.
        targets: Wrong classes, the likeliest first, that APGD is aimed at where something is left; 0 to leave it
            out.
        limit: Judge on this many images, chosen by a hash of their ids.
        seed: Seed of every random draw.
        lanes: Images attacked side by side in one batch.
        eot: Draws averaged in a gradient [default: what the defence declares; 1 if not random].
        draws: Fresh draws of a random model that judge a success by majority.
        every_mode: Make every gradient mode on every image; else an image that one mode fooled leaves the later
            ones.
        device: auto, cpu, cuda, cuda:1, ...
        out: Folder that holds the runs.
        name: Name of the run [default: made from the settings, so that they find it again].
        resume: Insist on an earlier run, or delete it. Default: continue if there is one.
        track: Log the finished run's numbers, curves and tables too: tensorboard, mlflow or wandb.
        observer: told of the progress.
    """

def purify(
    model: str = "tiny",
    *,
    data: str = "emoji?split=train",
    val: str | None = None,
    val_limit: int = 64,
    sigma: list[float] | float = [0.12, 0.25, 0.5],
    only: str | None = None,
    denoiser: str | None = None,
    size: str = "tiny",
    steps: int = 1000,
    mapper_steps: int = 1000,
    batch_size: int = 64,
    accumulate: int = 1,
    lr: float = 0.005,
    mapper_lr: float = 0.002,
    feature_weight: float = 2.0,
    pixel_weight: float = 1.0,
    diffusion_weight: float = 1.0,
    text_weight: float = 0.0,
    statistics_weight: float = 1.0,
    eps: str | None = None,
    norm: str | None = None,
    inner_steps: int | None = None,
    augment: str = "crop",
    ema: float = 0.99,
    precision: str = "fp32",
    limit: int | None = None,
    validate_every: float = 0.25,
    checkpoint_every: int = 0,
    seed: int = 0,
    device: str = "auto",
    out: Path | str = Path("runs"),
    name: str | None = None,
    resume: bool | None = None,
    track: str | None = None,
    observer: Observer | None = None,
) -> FinishedRun[TrainingSummary]:
    """Train a purifier and a mapper around a frozen encoder, as `robustvlm purify` does; options by their names.

    The folder of the run returned is a model spec, to be smoothed: `f"{run.folder}+smooth:0.25"`.

    Raises:
        UserError: whatever is wrong with the options, the data or the model.

    Example:
        >>> import tempfile
        >>> short = {"limit": 40, "val_limit": 4, "steps": 1, "mapper_steps": 1, "batch_size": 2}
        >>> purify("tiny", out=tempfile.mkdtemp(), **short).summary.method
        'purifier and mapper'

    Args:
        model: The encoder, which stays as it is; `robustvlm models` lists the forms. Not a smoothed one.
        data: Images to train on, without labels; `robustvlm data` lists the forms.
        val: Images to watch the score on [default: a part of the data, held out].
        val_limit: Watch the score on at most this many images.
        sigma: Noise level to serve, in [0, 1] pixels; may be repeated [default: 0.12, 0.25 and 0.5].
        only: purifier or mapper [default: first one, then the other].
        denoiser: Your own denoiser in the purifier's place, as module:callable (see docs/purify.md).
        size: Of the purifier: tiny, small or base.
        steps: Optimiser steps of the purifier.
        mapper_steps: Optimiser steps of the mapper.
        batch_size: Images per step, over all processes.
        accumulate: Parts that a batch is cut into, to save memory.
        lr: Peak learning rate of the purifier.
        mapper_lr: Peak learning rate of the mapper.
        feature_weight: Of 1 - cos to the clean feature (purifier).
        pixel_weight: Of the squared error of the pixels (purifier).
        diffusion_weight: Of the denoising loss (purifier).
        text_weight: Of KL(classes of the clean image || of the purified one), by the data's names (purifier).
        statistics_weight: Of the match of mean and spread (mapper).
        eps: Train the purifier against attacks of this radius [default: noise alone].
        norm: Linf or L2, of that attack [default: Linf].
        inner_steps: Gradient steps of that attack [default: 3].
        augment: none, flip, crop (and flip) or strong (colours too).
        ema: Decay of the moving average of the weights, which is kept.
        precision: fp32, or bf16 (weights and noise stay fp32).
        limit: Use this many images, chosen by a hash of their ids.
        validate_every: In steps; below 1, a share of all; 0: at the end only.
        checkpoint_every: In steps [default: every five minutes].
        seed: Seed of every random draw.
        device: auto, cpu, cuda, cuda:1, ...
        out: Folder that holds the runs.
        name: Name of the run [default: made from the settings, so that they find it again].
        resume: Insist on an earlier run, or delete it. Default: continue if there is one.
        track: Log the finished run's numbers, curves and tables too: tensorboard, mlflow or wandb.
        observer: told of the progress.
    """

def soup(
    models: list[str] | str,
    *,
    method: str = "uniform",
    val: str | None = None,
    by: str = "robust",
    classes: Path | str | None = None,
    templates: Path | str | None = None,
    norm: str = "Linf",
    eps: str | float | None = None,
    val_steps: int = 10,
    limit: int = 512,
    device: str = "auto",
    out: Path | str = Path("runs"),
    name: str | None = None,
    fresh: bool = False,
    track: str | None = None,
    observer: Observer | None = None,
) -> FinishedRun[Soup]:
    """Average the weights of models, as `robustvlm soup` does; options by their names. The run's folder is a model.

    Raises:
        UserError: fewer than two models, different architectures, greedy without images, or other wrong options.

    Example:
        >>> import tempfile
        >>> soup(["tiny", "tiny"], out=tempfile.mkdtemp()).summary.method
        'uniform'

    Args:
        models: Run folders, or specs, of one architecture.
        method: uniform (the mean of all), or greedy (each stays only if it does not harm).
        val: Images to choose by and to measure on; greedy needs them.
        by: What greedy goes by: robust or clean accuracy.
        classes: File of class names, one per line or a JSON list.
        templates: File of prompt templates, one per line with {}.
        norm: Linf or L2, of the attack that measures.
        eps: Its radius [default: 1/255; L2: 0.5].
        val_steps: Its PGD steps.
        limit: Measure on at most this many images.
        device: auto, cpu, cuda, cuda:1, ...
        out: Folder that holds the runs.
        name: Name of the run [default: made from the settings].
        fresh: Delete an earlier run of this name.
        track: Log the finished run's numbers, curves and tables too: tensorboard, mlflow or wandb.
        observer: told of the progress.
    """

def tune_prompts(
    model: str = "tiny",
    *,
    data: str = "emoji?split=train&copies=1",
    classes: Path | str | None = None,
    val: str | None = None,
    ood: list[str] | str = [],
    shots: int = 16,
    context: int = 4,
    start: str = "a picture of a",
    epochs: int = 10,
    batch_size: int = 256,
    lr: float = 0.01,
    lambda_ebm: float = 10.0,
    ebm: bool = True,
    lapt: bool = False,
    words: Path | str | None = None,
    c: int = 2,
    seed: int = 0,
    device: str = "auto",
    out: Path | str = Path("runs"),
    name: str | None = None,
    fresh: bool = False,
    track: str | None = None,
    observer: Observer | None = None,
) -> FinishedRun[PromptRecord]:
    """Learn prompts for a model, as `robustvlm tune-prompts` does; options by their names. The folder is a model
        spec.

    Raises:
        UserError: whatever is wrong with the options, the data or the model; a loss that is not finite.

    Example:
        >>> import tempfile
        >>> few = {"data": "emoji?split=train&styles=noto&copies=1", "epochs": 1, "shots": 1}
        >>> tune_prompts("tiny", out=tempfile.mkdtemp(), **few).summary.images
        101

    Args:
        model: An open_clip model, one of yours on MiniLM, or a folder on one; it stays as it is.
        data: Labelled images to learn from; `robustvlm data` lists the forms.
        classes: File of class names, one per line or a JSON list.
        val: Images of the same classes to measure on, another style say.
        ood: Unknown images to tell from those of --val, as DATA or NAME=DATA; may be repeated.
        shots: Images of each class to learn from; 0 for all.
        context: Number of context vectors (M).
        start: Words that the context begins as.
        epochs: Passes over the features.
        batch_size: Features per step.
        lr: Peak learning rate (Adam, cosine).
        lambda_ebm: Weight of the energy term.
        ebm: With the EBM terms, or CoOp without them.
        lapt: LAPT instead: a second context is learnt for words outside the classes, for detect --scores lapt.
        words: File of words outside the classes, for --lapt [default: the bundled class trees].
        c: Largest cosines that the energy change as a score resets.
        seed: Seed of every random draw.
        device: auto, cpu, cuda, cuda:1, ...
        out: Folder that holds the runs.
        name: Name of the run [default: made from the settings, so that they find it again].
        fresh: Delete an earlier run of this name first.
        track: Log the finished run's numbers, curves and tables too: tensorboard, mlflow or wandb.
        observer: told of the progress.
    """
