"""Errors and power, as a report tells them."""

import math
from pathlib import Path

import pytest

from dsv3.reporting.study_results import Study, read_study
from dsv3.study import evidence
from tests.reporting.test_study_results import made


def study_in(root: Path) -> Study:
    """Two arms with three seeds each; b is worse by 0.1, give or take 0.01."""
    for seed, noise in ((1, 0.0), (2, 0.01), (3, -0.01)):
        if not (root / f"b/seed{seed}").exists():
            made(root, "a", seed, bpb=2.0)
            made(root, "b", seed, bpb=2.1 + noise)
    return read_study(root)


def test_errors_of_a_fixed_number_of_seeds(tmp_path: Path) -> None:
    (section,) = evidence.errors(study_in(tmp_path))
    ((arm, seeds, difference, half, by_seeds, documents, p, holm, settled),) = section.rows
    assert (arm, seeds, difference, documents, settled) == ("b", 3, "+0.1000", None, "")
    assert half == by_seeds == pytest.approx(4.3027 * 0.01 / math.sqrt(3), rel=1e-4)
    assert p == holm == "0.003"
    assert not any("sequential" in sentence for sentence in section.sentences)
    assert any(
        "EMA weights make the error over seeds 1.00 times as large" in sentence for sentence in section.sentences
    )


def test_power_of_more_seeds(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    (section,) = evidence.power(study)
    difference = evidence.differences(study, evidence.headline(study))["b"]
    width, effect = evidence.curve_point(difference, 3)
    assert width == pytest.approx(difference.high - difference.mean)
    assert effect == pytest.approx(difference.detectable)
    widths = [evidence.curve_point(difference, n)[0] for n in evidence.SEEDS]
    assert widths == sorted(widths, reverse=True)
    with_documents = evidence.curve_point(difference._replace(documents=0.05), 1000)
    assert with_documents[0] == pytest.approx(0.05, rel=0.01), "which more seeds do not make narrower"
    assert section.rows[0][1].startswith(f"±{width:.4f}")


def test_one_seed_has_no_error(tmp_path: Path) -> None:
    made(tmp_path, "a", 1)
    made(tmp_path, "b", 1, bpb=2.1)
    study = read_study(tmp_path)
    assert [*evidence.errors(study), *evidence.power(study), *evidence.tuning(study), *evidence.matching(study)] == []
