"""Heads and scores: logistic regression and top-k are scikit-learn's, the neighbours' vote is done by hand."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_aimv2.embed.cache import Features
from mlx_aimv2.learn import classify
from mlx_aimv2.learn.classify.head import (
    PENALTIES,
    AttentiveHead,
    KnnHead,
    MeanHead,
    balanced,
    choose,
    solve,
)
from mlx_aimv2.learn.classify.linear import fit_logistic, minimize
from mlx_aimv2.learn.classify.results import Classification, confusion
from mlx_aimv2.learn.probes import mean_tokens, token_statistics
from mlx_aimv2.learn.samples import Sample
from mlx_aimv2.model import unit_length

pytestmark = pytest.mark.rounding


def blobs(seed: int, count: int = 211):
    chance = np.random.default_rng(seed)
    labels = chance.integers(0, 5, count)
    return (np.eye(5)[labels] @ chance.normal(size=(5, 7)) + chance.normal(size=(count, 7))).astype(np.float32), labels


def test_lbfgs_finds_the_minimum_of_rosenbrocks_valley():
    def valley(x):
        a, b = x
        gradient = np.array([-2 * (1 - a) - 400 * a * (b - a * a), 200 * (b - a * a)])
        return float((1 - a) ** 2 + 100 * (b - a * a) ** 2), gradient

    place, value = minimize(valley, np.array([-1.2, 1.0]), tolerance=1e-8)
    np.testing.assert_allclose(place, 1, atol=1e-6)
    assert value < 1e-12


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_logistic_regression_is_scikit_learns(l2):
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = blobs(1)
    weights, _ = fit_logistic(features.astype(np.float64), labels, 5, l2=l2)
    other = linear_model.LogisticRegression(C=1 / (l2 * len(labels)), tol=1e-8, max_iter=5000).fit(features, labels)
    mine = features @ weights[:-1] + weights[-1]
    wanted = other.decision_function(features)
    np.testing.assert_allclose(
        mine - mine.mean(axis=1, keepdims=True), wanted, atol=2e-2 * max(1, np.abs(wanted).max())
    )


def labelled(features, labels):
    return features, [Sample("", b"", (1, 1), int(label)) for label in labels]


def chosen_linear(train, val, **how):
    """The penalty that is chosen, and accuracy and negative loss of each on `val`."""
    found = {}

    def judge(settings, samples, logits):
        logits = logits - logits.max(axis=1, keepdims=True)
        labels = np.array([sample.target for sample in samples])
        losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
        found[settings["penalty"]] = (logits.argmax(axis=1) == labels).mean(), -losses.mean()
        return found[settings["penalty"]]

    return choose("linear", [(labelled(*train), labelled(*val))], 5, judge, is_balanced=False)["penalty"], found


def test_the_linear_probe_is_the_one_that_val_likes_best():
    features, labels = blobs(1)
    train, val = (features[:130], labels[:130]), (features[130:], labels[130:])
    penalty, found = chosen_linear(train, val)
    assert list(found) == list(PENALTIES)
    head = solve("linear", labelled(*train), 5, {"penalty": penalty, "is_balanced": False})
    logits = np.array(head(mx.array(val[0])[:, None])["logits"])
    right = (logits.argmax(axis=1) == val[1]).mean()
    assert right == pytest.approx(max(accuracy for accuracy, _ in found.values()), abs=0.01) and right > 0.5
    assert found[penalty] == max(found.values())


def test_of_probes_that_are_right_equally_often_the_surest_is_taken():
    features, labels = blobs(4)
    penalty, found = chosen_linear((features[:130], labels[:130]), (features[-9:], labels[-9:]))
    best = [loss for accuracy, loss in found.values() if accuracy == max(right for right, _ in found.values())]
    assert best[0] < max(best) > best[-1]
    assert found[penalty][1] == max(best)


def test_balanced_weights_are_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model")
    weights = pytest.importorskip("sklearn.utils.class_weight").compute_class_weight
    features, labels = blobs(1)
    kept = np.concatenate([np.flatnonzero(labels == label)[: 3 + 7 * label] for label in range(5)])
    features, labels = features[kept], labels[kept]
    wanted = weights("balanced", classes=np.arange(5), y=labels)
    np.testing.assert_allclose(balanced(labels, 6), [*wanted, 0], rtol=1e-6)
    mine, _ = fit_logistic(features.astype(np.float64), labels, 5, l2=0.01, weights=balanced(labels, 5)[labels])
    other = linear_model.LogisticRegression(
        C=1 / (0.01 * len(labels)), class_weight="balanced", tol=1e-8, max_iter=5000
    ).fit(features, labels)
    logits, wanted = features @ mine[:-1] + mine[-1], other.decision_function(features)
    np.testing.assert_allclose(logits - logits.mean(axis=1, keepdims=True), wanted, atol=2e-2 * np.abs(wanted).max())


def test_the_neighbours_vote_by_hand():
    chance = np.random.default_rng(2)
    bank, queries = (np.array(unit_length(mx.array(chance.normal(size=(n, 5))))) for n in (31, 4))
    labels = chance.integers(0, 3, 31)
    wanted = np.zeros((4, 3))
    for row, query in zip(wanted, queries, strict=True):
        cosines = bank @ query
        for near in np.argsort(-cosines)[:20]:
            row[labels[near]] += np.exp((cosines[near] - 1) / 0.07)
    head = KnnHead(5, 3, 31, 20, 0.07, False)
    head.bank, head.labels = mx.array(bank), mx.array(labels.astype(np.int32))
    found = np.exp(np.array(head(mx.array(queries[:, None]))["logits"]))
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-9)
    head.is_balanced = True
    found = np.exp(np.array(head(mx.array(queries[:, None]))["logits"]))
    np.testing.assert_allclose(found, wanted * balanced(labels, 3), rtol=1e-3, atol=1e-9)


def test_the_mean_head_takes_tokens_and_their_mean_alike():
    head = MeanHead(7, 3)
    head.linear.weight = mx.random.normal((3, 7), key=mx.random.key(0))
    tokens = mx.random.normal((2, 5, 7), key=mx.random.key(1))
    whole, mean = head(tokens)["logits"], head(tokens.mean(axis=1, keepdims=True))["logits"]
    np.testing.assert_allclose(np.array(whole), np.array(mean), rtol=1e-4, atol=1e-6)


def test_the_attentive_head_does_not_see_the_order_of_tokens_but_each_of_them():
    mx.random.seed(0)
    head = AttentiveHead(8, 2, 3)
    head.linear.weight = mx.random.normal((3, 8))
    tokens = mx.random.normal((2, 5, 8))
    first = np.array(head(tokens)["logits"])
    np.testing.assert_allclose(np.array(head(tokens[:, ::-1])["logits"]), first, atol=1e-5)
    for place in range(5):
        changed = np.array(tokens)
        changed[:, place, :3] += 2
        assert np.abs(np.array(head(mx.array(changed))["logits"]) - first).max() > 1e-3


def test_the_attentive_head_starts_as_the_linear_probe():
    chance = np.random.default_rng(3)
    tokens = mx.array(chance.normal(2, 3, (4, 5, 8)).astype(np.float32))
    probe = MeanHead(8, 3)
    probe.mean, probe.std = mx.array(chance.normal(size=8)), mx.array(chance.uniform(1, 2, 8))
    probe.linear.weight, probe.linear.bias = mx.array(chance.normal(size=(3, 8))), mx.array(chance.normal(size=3))
    head = AttentiveHead(8, 2, 3)
    head.start(mx.array(chance.normal(size=8)), mx.array(chance.uniform(1, 2, 8)), probe)
    np.testing.assert_allclose(np.array(head(tokens)["logits"]), np.array(probe(tokens)["logits"]), atol=1e-4)
    names = {name for name, _ in tree_flatten(head.trainable_parameters())}
    assert names == {"query", "k.weight", "v.weight", "linear.weight", "linear.bias"}


def test_statistics_of_tokens_are_those_of_all_at_once():
    rows = np.random.default_rng(4).normal(5, 2, (131, 3, 7)).astype(np.float16)
    samples = [Sample("", bytes([i]) * 32, (1, 2), 0) for i in range(131)]
    features = Features(rows, {sample.sha256: i for i, sample in enumerate(samples)})
    mean, std = token_statistics(features, samples)
    exact = rows.reshape(-1, 7).astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(std, exact.std(axis=0), rtol=1e-5)
    np.testing.assert_allclose(mean_tokens(features, samples), rows.astype(np.float32).mean(axis=1), rtol=1e-5)


def scored(seed: int, classes: int):
    chance = np.random.default_rng(seed)
    labels = chance.integers(0, classes, 97)
    predictions = [Classification(row) for row in chance.dirichlet(np.ones(classes), 97)]
    samples = [Sample("", b"", (1, 2), int(label)) for label in labels]
    scores, _ = classify.results.score(samples, predictions, [str(i) for i in range(classes)])
    return scores, labels, predictions


@pytest.mark.parametrize("classes", [3, 5, 11])
def test_scores_are_scikit_learns(classes):
    metrics = pytest.importorskip("sklearn.metrics")
    scores, labels, predictions = scored(4, classes)
    probabilities = np.stack([prediction.probabilities for prediction in predictions])
    found = probabilities.argmax(axis=1)
    assert scores["top1"] == pytest.approx(metrics.accuracy_score(labels, found), abs=1e-12)
    assert scores["mean_class"] == pytest.approx(metrics.balanced_accuracy_score(labels, found), abs=1e-12)
    if classes > 5:
        wanted = metrics.top_k_accuracy_score(labels, probabilities, k=5, labels=range(classes))
        assert scores["top5"] == pytest.approx(wanted, abs=1e-12)
    else:
        assert "top5" not in scores
    np.testing.assert_array_equal(confusion(labels, found, classes), metrics.confusion_matrix(labels, found))


def test_the_table_has_precision_before_recall():
    """Two of the first class, of which one is called the second, and one of the second."""
    samples = [Sample("", b"", (1, 2), label) for label in (0, 0, 1)]
    predictions = [Classification(np.eye(3)[label]) for label in (0, 1, 1)]
    _, table = classify.results.score(samples, predictions, ("cat", "dog", "emu"))
    assert table[1:] == [
        ["cat", "2", "100.0 %", "50.0 %", "66.7 %"],
        ["dog", "1", "50.0 %", "100.0 %", "66.7 %"],
        ["emu", "0", "none", "none", "none"],
    ]


def test_probabilities_are_the_softmax():
    found = classify.results.decode({"logits": np.array([1.0, 3.0, 90.0], np.float32)}, (0, 0))
    assert found.probabilities.sum() == pytest.approx(1)
    assert found.best(2) == [2, 1]
