"""Summary of a finished run."""

from dsv3.training.summary import accuracy_text, balance_text


def test_layers_without_tokens_have_no_violation() -> None:
    assert balance_text({"layers.1": 0.5, "layers.2": 1.5}).endswith("1.00 (worst layer 1.50)")
    assert balance_text({"layers.1": 0.5, "layers.2": None}).endswith("0.50 (worst layer 0.50)")
    assert balance_text({"layers.1": None}) == "no tokens came to the experts"
    assert balance_text({}) == "no experts"


def test_mtp_modules_without_tokens_have_no_accuracy() -> None:
    assert accuracy_text({"mtp1_accuracy": 0.25, "mtp2_accuracy": None}) == "mtp1_accuracy 0.250"
    assert accuracy_text({"mtp1_accuracy": None}) == accuracy_text({}) == "none"
