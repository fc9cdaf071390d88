"""Every method: its loss by an independent formula, gradients, training that lowers it, and what it needs."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_tower import NAMES, SmallVLM, images, make_task, small_forest, small_vlm
from torch import Tensor

from robustvlm.attacks import ThreatModel
from robustvlm.core.framing import to_pixels
from robustvlm.data import open_data
from robustvlm.data.source import Sample
from robustvlm.defenses.finetune import METHODS, FinetuneSettings, HierarchicalOptions, InnerAttack, finetune_task
from robustvlm.defenses.finetune.hierarchical import Hierarchical, ProjectedTexts
from robustvlm.defenses.finetune.hyperbolic import distances, hyp_avg
from robustvlm.defenses.finetune.methods import frozen
from robustvlm.errors import UserError
from robustvlm.models import load_model
from robustvlm.models.zero_shot import class_embeddings
from robustvlm.training import Draws

DRAWS = Draws(0, 3, list("abcdef"))
# An attack without room leaves the images as they are, so that losses have closed forms.
STILL = InnerAttack(threat=ThreatModel("Linf", 1e-9), steps=1, random_start=False)


def logits(vlm: SmallVLM, pixels: Tensor) -> Tensor:
    return vlm.logit_scale * vlm.encode_image(pixels) @ class_embeddings(vlm, NAMES, ("{}", "a {}")).T


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss_and_moves_the_vision_tower_alone(method: str) -> None:
    vlm = small_vlm()
    task = make_task(vlm, method, small_forest())
    before = {name: value.clone() for name, value in vlm.state_dict().items()}
    pixels, labels = images()
    optimizer = torch.optim.AdamW([p for p in vlm.parameters() if p.requires_grad], lr=3e-3)
    found = []
    for _ in range(12):
        task.train_mode()
        loss = task.losses(pixels, labels, 0, DRAWS)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    # FARE begins at its clean optimum, and has only what the attack adds to lower.
    assert found[-1] < found[0]
    moved = {name for name, value in vlm.state_dict().items() if not torch.equal(value, before[name])}
    allowed = ("stem.", "blocks.", "proj", "stem_norm.weight", "stem_norm.bias")
    extra = {"text_projection"} if method == "hierarchical" else set()
    assert {name for name in moved if not name.startswith(allowed)} == extra


@pytest.mark.parametrize("method", METHODS)
def test_losses_follow_from_the_draws_and_leave_no_gradient_behind(method: str) -> None:
    vlm = small_vlm()
    task = make_task(vlm, method, small_forest())
    pixels, labels = images()
    first, second = (task.losses(pixels, labels, 0, DRAWS)["loss"] for _ in range(2))
    assert torch.equal(first, second)
    assert all(p.grad is None for p in vlm.parameters())
    assert not any(part.training for part in vlm.modules())


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_autocast_gives_nearly_the_same_loss(method: str) -> None:
    task = make_task(small_vlm(), method, small_forest(), attack=STILL)
    pixels, labels = images()
    wide = task.losses(pixels, labels, 0, DRAWS)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        narrow = task.losses(pixels, labels, 0, DRAWS)["loss"]
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, wide, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"hierarchical"}))
def test_loss_is_a_mean_over_images(method: str) -> None:
    """So that the mean over ranks, or over the parts of an accumulated batch, is that of the whole."""
    task = make_task(small_vlm(), method)
    pixels, labels = images()
    whole = task.losses(pixels, labels, 0, DRAWS)["loss"]
    parts = [
        task.losses(pixels[i : i + 2], labels[i : i + 2], 0, Draws(0, 3, DRAWS.ids[i : i + 2]))["loss"]
        for i in (0, 2, 4)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_baselines_agree_with_their_formulas() -> None:
    plain, pixels, labels = small_vlm(), *images()
    moved = small_vlm(seed=5)
    cross_entropy = F.cross_entropy(logits(plain, pixels), labels)
    expected = {"clean": cross_entropy, "tecoa": cross_entropy}
    for method, value in expected.items():
        task = make_task(small_vlm(), method, attack=STILL)
        torch.testing.assert_close(task.losses(pixels, labels, 0, DRAWS)["loss"], value, rtol=1e-4, atol=1e-5)

    fare = make_task(vlm := small_vlm(), "fare", attack=STILL)
    vlm.load_state_dict(moved.state_dict())
    error = (moved.embed_image(pixels) - plain.embed_image(pixels)).square().sum(1).mean()
    torch.testing.assert_close(fare.losses(pixels, labels, 0, DRAWS)["loss"], error, rtol=1e-4, atol=1e-5)

    # The texts stay those of the model before training.
    pmg = make_task(vlm := small_vlm(), "pmg", attack=STILL, options={"general": 2.0, "clean": 0.5})
    embeddings = class_embeddings(vlm, NAMES, ("{}", "a {}"))
    vlm.load_state_dict(moved.state_dict())
    now, original = (10 * tower.encode_image(pixels) @ embeddings.T for tower in (moved, plain))
    p, q = now.softmax(1), original.softmax(1)
    general = (q * (q.log() - p.log())).sum(1).mean()
    terms = pmg.losses(pixels, labels, 0, DRAWS)
    torch.testing.assert_close(terms["loss"], F.cross_entropy(now, labels) + 2 * general, rtol=1e-4, atol=1e-5)
    assert terms["clean"].abs() < 1e-4
    turned = make_task(vlm := small_vlm(), "pmg", attack=STILL, options={"reverse": True})
    vlm.load_state_dict(moved.state_dict())
    reverse = (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(turned.losses(pixels, labels, 0, DRAWS)["general"], reverse, rtol=1e-4, atol=1e-5)
    assert not torch.isclose(general, reverse, rtol=1e-2)

    simclip = make_task(vlm := small_vlm(), "simclip", attack=STILL)
    assert simclip.losses(pixels, labels, 0, DRAWS)["loss"].item() == pytest.approx(-1, abs=1e-5)
    vlm.load_state_dict(moved.state_dict())
    cosine = (moved.encode_image(pixels) * plain.encode_image(pixels)).sum(1).mean()
    torch.testing.assert_close(simclip.losses(pixels, labels, 0, DRAWS)["loss"], -cosine, rtol=1e-4, atol=1e-5)


def original_and_student() -> tuple[SmallVLM, SmallVLM]:
    """Return an encoder and one a little away from it, as after some steps of training."""
    plain, student = small_vlm(), small_vlm()
    draws = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draws))
    return plain, student


def worst_of(student: SmallVLM, goal: Tensor, pixels: Tensor) -> Tensor:
    """Return where the inner attack ends on the squared distance of features to a goal."""
    attack = InnerAttack(threat=ThreatModel("Linf", 0.05), steps=2)
    return attack(lambda x, _: (student.embed_image(x) - goal).square().sum(), pixels, DRAWS)[0]


def test_simclip_is_the_cosine_to_the_frozen_original_and_its_second_half_has_no_gradient() -> None:
    """Against a second implementation: value and gradient of both halves, at the end of FARE's inner attack."""
    pixels, labels = images()
    plain, student = original_and_student()
    task = make_task(vlm := small_vlm(), "simclip")  # the teacher is the model as it is now
    vlm.load_state_dict(student.state_dict())
    loss = task.losses(pixels, labels, 0, DRAWS)["loss"]
    loss.backward()
    original = plain.embed_image(pixels).detach()
    cosine = F.cosine_similarity(student.embed_image(worst_of(student, original, pixels)), original).mean()
    (-cosine / 2).backward()
    torch.testing.assert_close(loss, -cosine, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vlm.proj.grad, student.proj.grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(vlm.stem.weight.grad, student.stem.weight.grad, rtol=1e-3, atol=1e-6)
    assert all(parameter.grad is None for parameter in task.method.teacher.parameters())


def test_simclip_attacks_the_squared_distance_as_fare_does() -> None:
    pixels = images()[0]
    plain, student = original_and_student()
    for name in ("fare", "simclip"):
        method = make_task(vlm := small_vlm(), name).method
        vlm.load_state_dict(student.state_dict())
        goal, found = method.worst_case(pixels, DRAWS)  # type: ignore[attr-defined]
        torch.testing.assert_close(goal, plain.embed_image(pixels))
        assert not goal.requires_grad
        assert not found.requires_grad
        torch.testing.assert_close(found, worst_of(student, goal, pixels))


@pytest.mark.slow
def test_simclip_makes_the_bundled_model_more_robust_and_keeps_its_accuracy() -> None:
    """A smaller version of `finetune tiny --method simclip`: with its own features as partner, accuracy is lost."""
    source = open_data("emoji?split=train&copies=1")
    samples = [item for item in source.samples(limit=96) if isinstance(item, Sample)]
    pixels = torch.stack([to_pixels(item.image, 64) for item in samples])
    labels, ids = torch.tensor([item.label for item in samples]), [item.id for item in samples]
    threat = ThreatModel("Linf", 2 / 255)
    settings = FinetuneSettings(method="simclip", attack=InnerAttack(threat=threat, steps=2))
    task = finetune_task(
        vlm := load_model("tiny"),
        settings,
        class_names=source.class_names,
        templates=source.templates,
        calibration=pixels[:4],
    )
    method = task.method

    def accuracies() -> tuple[float, float]:
        with frozen(vlm):
            attack = InnerAttack(threat=threat, steps=10)
            found = attack(
                lambda x, _: F.cross_entropy(method.logits(vlm, x), labels[:64], reduction="sum"),
                pixels[:64],
                Draws(1, 0, ids[:64]),
            )[0]
            with torch.no_grad():
                clean, robust = (method.logits(vlm, x).argmax(1) == labels[:64] for x in (pixels[:64], found))
        return float(clean.float().mean()), float(robust.float().mean())

    before = accuracies()
    optimizer = torch.optim.AdamW([p for p in vlm.parameters() if p.requires_grad], lr=5e-4)
    for step in range(16):
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * min(1.0, (step + 1) / 4)
        rows = [(32 * step + i) % 96 for i in range(32)]
        optimizer.zero_grad()
        task.losses(pixels[rows], labels[rows], step, Draws(0, step, [ids[row] for row in rows]))["loss"].backward()
        torch.nn.utils.clip_grad_norm_(vlm.parameters(), 1.0)
        optimizer.step()
    after = accuracies()
    assert after[0] > 0.75
    assert after[1] > before[1] + 0.1


def hierarchical(vlm: SmallVLM, attack: InnerAttack = STILL, **options: object) -> Hierarchical:
    chosen = {"options": HierarchicalOptions(**options)}  # type: ignore[arg-type]
    method = make_task(vlm, "hierarchical", small_forest(), attack=attack, options=chosen).method
    assert isinstance(method, Hierarchical)
    return method


def test_embedding_is_fitted_to_the_model_before_training() -> None:
    method = hierarchical(small_vlm(), curvature=4.0, depth=0.5)
    pixels = images(5, seed=2)[0]
    features, texts = method.student.embed_image(pixels), method.texts()[:4]
    fitted = method.embedding
    assert float((fitted.image_scale * features).norm(dim=1).mean().detach()) == pytest.approx(0.25)
    assert float((fitted.text_scale * texts).norm(dim=1).mean().detach()) == pytest.approx(0.25)
    level = fitted.texts(0.25 * F.normalize(texts, dim=1))
    apart = distances(fitted.images(features), level, 4.0) / fitted.temperature
    cosine = 10 * F.normalize(features, dim=1) @ F.normalize(texts, dim=1).T
    gaps = [(best[:, 0] - best[:, 1]).mean() for best in (x.topk(2).values for x in (-apart, cosine))]
    torch.testing.assert_close(gaps[0], gaps[1], rtol=1e-4, atol=0)


def test_curvature_is_a_unit_of_length() -> None:
    """At one depth, lengths go with 1 / sqrt(r) and the fitted temperature with them: alignment does not see r."""
    pixels, labels = images()
    unit = hierarchical(small_vlm(), eps_text=0.0, vicinity_radius=0.2).terms(pixels, labels, DRAWS)
    for r in (0.25, 9.0):
        scale = r**-0.5
        options = {"vicinity_radius": 0.2 * scale, "norm_gap": 0.01 * scale}
        found = hierarchical(small_vlm(), curvature=r, eps_text=0.0, **options).terms(pixels, labels, DRAWS)
        torch.testing.assert_close(found["alignment"], unit["alignment"], rtol=1e-4, atol=1e-4)
        for name in ("vicinity", "norm order"):
            torch.testing.assert_close(found[name], unit[name] * scale, rtol=1e-4, atol=1e-5)


def test_ordered_depths_put_parents_nearer_to_the_origin_and_leave_the_classes_where_they_were() -> None:
    pixels, labels = images()
    found = hierarchical(small_vlm(), ordered_depths=True)
    norms, unordered = (list(method.measures().values()) for method in (found, hierarchical(small_vlm())))
    tangents = [math.atanh(norm) for norm in norms]
    weights = [1 - level / len(norms) for level in range(len(norms))]
    assert tangents == pytest.approx([tangents[0] * w for w in weights], rel=1e-4)
    assert norms[0] == pytest.approx(unordered[0], rel=1e-5)
    assert (
        found.terms(pixels, labels, DRAWS)["norm order"]
        < hierarchical(small_vlm()).terms(pixels, labels, DRAWS)["norm order"]
    )


def test_switches_switch_their_terms() -> None:
    pixels, labels = images()
    full = hierarchical(small_vlm()).terms(pixels, labels, DRAWS)
    assert full["loss"] > full["alignment"]
    plain = hierarchical(small_vlm(), vicinity=0.0, norm_order=0.0).terms(pixels, labels, DRAWS)
    torch.testing.assert_close(plain["loss"], full["alignment"])
    fewer = hierarchical(small_vlm(), negatives=False).terms(pixels, labels, DRAWS)
    assert fewer["alignment"] < full["alignment"]
    leaves = hierarchical(small_vlm(), leaf_only=True).terms(pixels, labels, DRAWS)
    assert leaves["alignment"] < fewer["alignment"]
    assert leaves["norm order"] == 0
    assert "text_projection" not in {
        name for name, p in hierarchical(small_vlm(), train_texts=False).student.named_parameters() if p.requires_grad
    }


def test_texts_are_held_where_the_tower_is_trained_through_adapters() -> None:
    def trained(trainable: str, **options: object) -> bool:
        chosen = {"options": HierarchicalOptions(**options)}  # type: ignore[arg-type]
        task = make_task(small_vlm(), "hierarchical", small_forest(), trainable=trainable, options=chosen)
        return bool(task.method.also_trained())

    assert [trained(subset) for subset in ("all", "last:1", "lora:2", "ssf")] == [True, True, False, False]
    assert trained("lora:2", train_texts=True)
    assert not trained("all", train_texts=False)


def test_per_level_attacks_agree_with_the_universal_one_where_there_is_no_room() -> None:
    pixels, labels = images()
    universal = hierarchical(small_vlm()).terms(pixels, labels, DRAWS)["loss"]
    separate = hierarchical(small_vlm(), per_level=True).terms(pixels, labels, DRAWS)["loss"]
    torch.testing.assert_close(separate, universal, rtol=1e-4, atol=1e-4)


def test_attack_raises_the_loss_and_text_perturbation_raises_it_further() -> None:
    pixels, labels = images()
    attack = InnerAttack(threat=ThreatModel("Linf", 0.05), steps=4, random_start=False)
    still = hierarchical(small_vlm(), eps_text=0.0).terms(pixels, labels, DRAWS)["alignment"]
    images_only = hierarchical(small_vlm(), attack, eps_text=0.0).terms(pixels, labels, DRAWS)["alignment"]
    both = hierarchical(small_vlm(), attack, eps_text=0.05).terms(pixels, labels, DRAWS)["alignment"]
    assert still < images_only < both


def test_a_forest_is_the_sum_over_its_trees() -> None:
    pixels, labels = images()
    whole = hierarchical(small_vlm(), eps_text=0.0).terms(pixels, labels, DRAWS)
    total = torch.zeros(())
    for tree in small_forest():
        alone = replace(small_forest(), trees=(tree,))
        options = {"options": HierarchicalOptions(eps_text=0.0)}
        one = make_task(small_vlm(), "hierarchical", alone, attack=STILL, options=options)
        total = total + one.losses(pixels, labels, 0, DRAWS)["loss"]
    torch.testing.assert_close(whole["loss"], total, rtol=1e-4, atol=1e-4)


def test_norm_order_comes_about() -> None:
    options = {"options": HierarchicalOptions(norm_order=100.0, norm_gap=0.05)}
    task = make_task(vlm := small_vlm(), "hierarchical", small_forest(), attack=STILL, options=options)
    optimizer = torch.optim.Adam([p for p in vlm.parameters() if p.requires_grad], lr=1e-2)
    pixels, labels = images()
    found = []
    for _ in range(30):
        terms = task.losses(pixels, labels, 0, DRAWS)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        found.append(float(terms["norm order"].detach()))
    assert found[-1] < 0.75 * found[0]


def test_projected_texts_keep_their_digits_under_autocast() -> None:
    texts = ProjectedTexts(small_vlm(), NAMES, ("{}", "a {}"))
    with torch.autocast("cpu", torch.bfloat16):
        found = texts()
    assert torch.equal(found, texts())


def test_texts_follow_the_projection_and_fall_back_to_constants() -> None:
    vlm = small_vlm()
    texts = ProjectedTexts(vlm, NAMES, ("{}", "a {}"))
    expected = torch.stack([vlm.embed_text([name, f"a {name}"]).mean(0) for name in NAMES])
    torch.testing.assert_close(texts(), expected)
    with torch.no_grad():
        vlm.text_projection.mul_(2)  # type: ignore[union-attr]
    torch.testing.assert_close(texts(), 2 * expected)
    assert texts.projection() == [vlm.text_projection]

    class Bent(SmallVLM):
        def _text_features(self, texts: list[str]) -> Tensor:
            return torch.tanh(super()._text_features(texts))

    bent = Bent().eval()
    bent.load_state_dict(small_vlm().state_dict())
    constant = ProjectedTexts(bent, NAMES, ("{}",))
    assert not constant.trainable
    torch.testing.assert_close(constant(), bent.embed_text(list(NAMES)))
    assert hierarchical(bent).settings()["texts"] == "constant"


def test_settings_are_plain_json() -> None:
    for method in METHODS:
        found = make_task(small_vlm(), method, small_forest()).method.settings()
        assert json.loads(json.dumps(found)) == found


def test_teacher_is_a_copy_that_stays() -> None:
    vlm = small_vlm()
    method = make_task(vlm, "fare").method
    before = copy.deepcopy(method.teacher.state_dict())
    with torch.no_grad():
        vlm.proj.zero_()
    assert all(torch.equal(value, before[name]) for name, value in method.teacher.state_dict().items())
    assert not any(p.requires_grad for p in method.teacher.parameters())


def test_what_is_missing_is_said() -> None:
    with pytest.raises(UserError, match="needs a class tree"):
        make_task(small_vlm(), "hierarchical")
    with pytest.raises(UserError, match="did you mean 'tecoa'"):
        FinetuneSettings(method="tecao")
    with pytest.raises(UserError, match="trainable must be"):
        FinetuneSettings(trainable="half")
    with pytest.raises(UserError, match="'clean' of pmg must be 0 or more and finite, got nan"):
        make_task(small_vlm(), "pmg", options={"clean": math.nan})


def test_superclass_texts_can_be_the_midpoints_of_their_classes() -> None:
    method = hierarchical(small_vlm(), name_superclasses=False, shared_depth=False)
    tree, tangents = method.trees[0], method._tangents()
    nodes, texts = method._node_texts(tangents, tree), method.embedding.texts(tangents)
    pet = hyp_avg(texts[:2], torch.ones(1, 2), 1.0)
    torch.testing.assert_close(nodes[:5], torch.cat([texts[:4], pet]))
    animal = hyp_avg(torch.cat([pet, texts[2:3]]), torch.ones(1, 2), 1.0)
    torch.testing.assert_close(nodes[7:8], animal)


def test_nearest_class_is_the_one_of_the_largest_cosine() -> None:
    method = hierarchical(small_vlm())
    tree = method.trees[0]
    nodes = method._node_texts(method._tangents(), tree)
    for level in range(tree.levels):
        lengths = nodes[tree.level_of == level].norm(dim=1)
        torch.testing.assert_close(lengths, lengths[:1].expand_as(lengths))
    features = method.student.embed_image(images(40)[0])
    apart = distances(method.embedding.images(features), nodes[:4], 1.0)
    cosines = F.normalize(features, dim=1) @ F.normalize(method.texts()[:4], dim=1).T
    assert torch.equal(apart.argmin(dim=1), cosines.argmax(dim=1))
    own = hierarchical(small_vlm(), shared_depth=False)
    assert own._node_texts(own._tangents(), tree)[:4].norm(dim=1).std() > 0.01
