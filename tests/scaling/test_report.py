"""The report of made-up machines: everything in it is computed from what was measured."""

from __future__ import annotations

import csv
import dataclasses
import re
from pathlib import Path

import pytest
from synthetic import MACHINE, POINTS, ds_config_of, measured, sweep, truth

from gfrnn.config import UserError
from gfrnn.scaling.clusters import load_cluster
from gfrnn.scaling.page import Report, Section, write, written
from gfrnn.scaling.prediction import fit
from gfrnn.scaling.records import Machine, Measurement, Timed
from gfrnn.scaling.report import make
from gfrnn.scaling.target import Reference, Target

TARGET = Target(1.9, Reference(10_000, 2000), critical=200_000)


def study(machine: Machine = MACHINE) -> tuple[list[Measurement], list[tuple[Machine, Timed]]]:
    found = [measured(truth(straggling=0.01), point, noise=0.02) for point in POINTS]
    theory = [
        dataclasses.replace(
            each,
            machine=machine,
            step_seconds_low=0.98 * each.step_seconds,
            step_seconds_high=1.03 * each.step_seconds,
            predicted_bytes=dict(each.bytes),
            memory_bytes=10**9,
            predicted_memory_bytes=11 * 10**8,
            parameters=1_234_567,
            flops=10**9,
        )
        for each in found
    ]
    return theory, [(machine, timed) for timed in sweep(noise=0.02)]


@pytest.fixture(scope="module")
def made() -> Report:
    return make(*study(), clusters=[load_cluster("dgx-h100")], target=TARGET)


def section(made: Report, title: str) -> Section:
    (found,) = (each for each in made.sections if each.title == title)
    return found


def test_scaling_is_against_one_process(made: Report) -> None:
    measurements, _ = study()
    strong, weak = section(made, "Strong scaling"), section(made, "Weak scaling")
    by_point = {each.point: each for each in measurements}
    one = by_point[POINTS[0]].characters_per_second
    rows = [row for row in weak.rows if row[0].startswith("8 rows a process") and " z0 " in row[0]]
    expected = [
        by_point[point].characters_per_second / one / point.world_size
        for point in POINTS
        if point.ds_config == "z0" and point.rows == 8 * point.world_size and point.nodes == 1
    ]
    assert [row[3] for row in rows] == [f"{share:.0%}" for share in expected]
    assert strong.rows
    assert [row[1] for row in weak.rows if row[0].startswith("across nodes, 8 rows") and " z0 " in row[0]] == ["1", "4"]
    assert "5.0%" in weak.rows[0][-1]


def test_without_one_process_it_says_what_the_rest_is_measured_against() -> None:
    measurements, timed = study()
    made = make([each for each in measurements if each.point.world_size > 1], timed, clusters=[], target=None)
    reached = [line for line in made.conclusions if " processes reach " in line]
    assert reached
    for line in reached:
        found = re.search(r"(\d+) processes reach .* of ([\d.]+) times what (\d+) do\.$", line)
        assert found is not None, line
        assert int(found[1]) == float(found[2]) * int(found[3])


def test_two_sections_of_one_title_have_files_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("not of the report")
    two = [Section("Theirs", header=["h"], rows=[[value]]) for value in "ab"]
    report = Report("a title", "about", sections=two)
    write(report, tmp_path)
    assert [path.name for path in written(report, tmp_path)] == ["index.html", "theirs.csv", "theirs-2.csv"]
    assert [(tmp_path / name).read_text().split() for name in ("theirs.csv", "theirs-2.csv")] == [
        ["h", "a"],
        ["h", "b"],
    ]


def test_the_page_needs_no_other_file(made: Report, tmp_path: Path) -> None:
    page = write(made, tmp_path)
    text = page.read_text()
    assert made.title in text
    for line in made.conclusions:
        assert line.replace("&", "&amp;").replace("'", "&#39;") in text
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert sources
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    for each in made.sections:
        if each.figure is not None:
            assert (tmp_path / f"{each.slug}.png").stat().st_size > 5000
        if each.rows:
            with (tmp_path / f"{each.slug}.csv").open() as f:
                assert list(csv.reader(f)) == [each.header, *each.rows]


def test_every_residual_is_shown(made: Report) -> None:
    found = section(made, "The model and its residuals")
    assert len(found.rows) == len(POINTS)
    measurements, timed = study()
    model = fit(measurements, [each for _, each in timed], ds_config_of)
    assert model.network is not None
    for name in ("each ZeRO config", "each number of rows", "each number of processes"):
        assert any(line.startswith(f"Held out, {name} in turn (synthetic): median error ") for line in found.text)


def test_it_says_from_where_on_more_are_not_worth_it(made: Report) -> None:
    beyond = [line for line in made.conclusions if "strong scaling" in line and "beyond" in line]
    assert beyond
    for line in beyond:
        number = re.search(r"beyond (\d+) process", line)
        share = re.search(r"\((\d+)% at (\d+); 90 % interval: \d+% to \d+%\)", line)
        assert number is not None
        assert share is not None
        assert int(share[1]) < 50
        assert int(share[2]) > int(number[1])
    assert any("GPUs are worth using to reach 1.9 BPC" in line for line in made.conclusions)
    assert any(each.title == "Time and cost to 1.9 BPC, DGX H100, NDR InfiniBand" for each in made.sections)


def test_two_machines_are_told_apart() -> None:
    one, sweep_one = study()
    other, sweep_other = study(dataclasses.replace(MACHINE, network="1gbit"))
    made = make([*one, *other], [*sweep_one, *sweep_other])
    names = [row[0] for row in section(made, "The model and its residuals").rows]
    assert sum("synthetic" in name for name in names) == sum("1gbit" in name for name in names) == len(POINTS)
    assert "8 points on synthetic" in made.about or f"{len(POINTS)} points on synthetic" in made.about


def test_each_machine_is_predicted_in_a_dtype_of_its_own() -> None:
    one, sweep_one = study()
    other, sweep_other = study(dataclasses.replace(MACHINE, network="1gbit"))
    other = [dataclasses.replace(each, point=dataclasses.replace(each.point, dtype="bf16")) for each in other]
    made = make([*one, *other], [*sweep_one, *sweep_other], clusters=[load_cluster("dgx-h100")])
    titles = [each.title for each in made.sections]
    for name in ("this network (synthetic)", "this network (1gbit)", "DGX H100, NDR InfiniBand"):
        assert f"Predicted to 4096 processes, {name}" in titles


def test_a_gpu_stands_for_clusters_of_its_kind_alone() -> None:
    measurements, _ = study(dataclasses.replace(MACHINE, device="NVIDIA H100 80GB HBM3"))
    gpu = [
        dataclasses.replace(each, point=dataclasses.replace(each.point, dtype="bf16"))
        for each in measurements
        if each.point.world_size == 1
    ]
    names = ("dgx-h100", "hgx-h200")
    h100, h200 = clusters = [load_cluster(name) for name in names]
    cpu, timed = study()  # in fp32
    faster = [dataclasses.replace(each, step_seconds=each.step_seconds / 9) for each in cpu]
    made = make([*gpu, *faster], timed, clusters=clusters)
    own, other = (section(made, f"Predicted to 4096 processes, {cluster.name}") for cluster in (h100, h200))
    assert own.text == []
    assert other.text == [
        "No GPU of this kind was measured: what one computes is assumed from its data sheet, and so wide."
    ]
    best = max(gpu, key=lambda each: each.characters_per_second)
    alone = next(row for row in own.rows if row[0] == "weak")
    assert float(alone[-1]) == pytest.approx(1e3 * best.step_seconds, rel=0.15)


def test_configs_are_those_that_were_measured(tmp_path: Path) -> None:
    """Whatever has become of their files."""
    measurements, timed = study()
    content = {"zero_optimization": {"stage": 2}}
    files = {"z0": str(tmp_path / "0.json"), "z2": str(tmp_path / "2.json")}
    kept = [
        dataclasses.replace(
            each,
            point=dataclasses.replace(each.point, ds_config=files[each.point.ds_config]),
            config=content,
        )
        for each in measurements
    ]
    made = make(kept, timed, clusters=[load_cluster("dgx-h100")])
    assert len(section(made, "The model and its residuals").rows) == len(POINTS)
    kept = [dataclasses.replace(each, config={}) for each in kept]
    with pytest.raises(UserError, match="No such file"):
        make(kept, timed, clusters=[load_cluster("dgx-h100")])


def test_a_point_that_failed_is_shown_with_its_reason() -> None:
    measurements, timed = study()
    failed = dataclasses.replace(measurements[-1], failed="out of memory: 3 of 2 GB")
    made = make([*measurements[:-1], failed], timed)
    assert section(made, "Points without figures").rows[0][-1] == "out of memory: 3 of 2 GB"
    again = make([failed, *measurements], timed)  # --again
    assert all(each.title != "Points without figures" for each in again.sections)


def test_what_less_on_the_wire_costs() -> None:
    measurements, timed = study()
    several = measurements[1]
    whole = dataclasses.replace(several, bpc=3.0, trained_updates=50, noise_scale=12_345.0)
    point = dataclasses.replace(several.point, compression="topk")
    less = dataclasses.replace(several, point=point, bpc=3.02, trained_updates=50, step_seconds=0.01)
    made = make([whole, less, *measurements[2:]], timed)
    found = section(made, "Speed beside what is learned")
    assert [row[-3:] for row in found.rows] == [["3.000", "+0.000", "12,345"], ["3.020", "+0.020", ""]]
    assert "BPC above that without compression after as many updates, at most: topk +0.020." in made.conclusions
    assert len(section(made, "The model and its residuals").rows) == len(measurements) - 1  # not of topk
    longer = dataclasses.replace(less, trained_updates=80)  # of another study: no comparison
    unlike = make([whole, longer, *measurements[2:]], timed)
    assert [row[-2] for row in section(unlike, "Speed beside what is learned").rows] == ["+0.000", ""]
    assert not any("BPC above that without compression" in each for each in unlike.conclusions)


def test_what_cannot_be_reported_is_a_line() -> None:
    measurements, timed = study()
    other = dataclasses.replace(measurements[0], point=dataclasses.replace(POINTS[0], preset="demo"))
    with pytest.raises(UserError, match="measurements of demo and gf-lstm-3x140; choose one with --preset"):
        make([*measurements, other], timed)
    failed = [dataclasses.replace(each, failed="no memory") for each in measurements]
    with pytest.raises(UserError, match=r"every point of the study failed \(no memory\)"):
        make(failed, timed)


def test_few_points_are_one_number_and_no_comparison() -> None:
    measurements, timed = study()
    one = measurements[0]
    two = dataclasses.replace(measurements[1], point=dataclasses.replace(measurements[1].point, rows=one.point.rows))
    lines = make([one, two], timed, clusters=[load_cluster("dgx-h100")]).conclusions
    reached = next(line for line in lines if " processes reach " in line)
    assert re.search(r": 2 processes reach \d+% \(z0, 8 rows\) of 2 times one\.$", reached)
    assert any(re.fullmatch(r"Communication takes \d+% of an update \(z0, 2 processes, .*\)\.", line) for line in lines)
    assert "The bytes that theory gives are 0.00% off those counted." in lines
    assert not any("Least is sent" in line for line in lines)
    beyond = [line for line in lines if "up to 4096 processes" in line or "falls below 50 %" in line]
    assert sum(line.startswith("Predicted from 2 points: on this network (synthetic), ") for line in beyond) == 2
    assert sum(line.startswith("Predicted from data sheets' rates: on DGX H100, ") for line in beyond) == 2
    assert len(beyond) == 4
    assert any("(45% at 2; no interval: too few points)" in line for line in beyond)

    lines = make([one], []).conclusions
    assert any(re.fullmatch(r"The products' peak is used to \d+% \(z0, 1 process, .*\)\.", line) for line in lines)
    assert "Memory is predicted at 1.10 of what is measured." in lines
    assert "The model of a step's time is 0.0% off on the one point it was fitted to." in lines


def test_one_process_alone_is_reported() -> None:
    """What takes more is said to be missing."""
    measurements, _ = study()
    alone = [each for each in measurements if each.point.world_size == 1]
    made = make(alone, [])
    assert section(made, "Strong scaling").text == [
        "Not measured: it takes points that differ in the number of processes alone."
    ]
    assert section(made, "The model and its residuals").rows
