"""What training spends beside its updates, by the clock: no other test runs beside it."""

from __future__ import annotations

from launch import metrics, train


def test_data_and_logging_cost_little(tmp_path):
    """The share of an update's time that fetching its batch and writing log lines take, in the demo."""
    status, _, err = train(tmp_path / "run", ["--preset", "demo", "--max-updates", "40", "--valid-bytes", "5000"])
    assert status == 0, err
    shares = sorted(line["overhead_share"] for line in metrics(tmp_path / "run") if "overhead_share" in line)
    assert len(shares) == 4
    assert 0 < shares[0] < 0.02  # the least: a pause of the machine may be in any of the others
