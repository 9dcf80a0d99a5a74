"""`iedit evaluate` on small generated folders with the embedded model: files, rows, figures, and what goes wrong."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from iedit.runtime import editor
from iedit.runtime.cli.main import main
from iedit.training import agreement as measure
from iedit.training import classifier, truth, workers
from iedit.training.cli_evaluate import evaluate, names


def test_help_imports_no_torch() -> None:
    code = "import sys; from iedit.training.cli_evaluate import evaluate; evaluate(['--help'], standalone_mode=False)"
    code += "; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("False")


def test_the_help_of_truth_names_every_method_and_kind() -> None:
    told = " ".join(CliRunner().invoke(evaluate, ["truth", "--help"]).stdout.split())
    told = told.replace("- ", "-")  # lines end at hyphens
    assert all(name in told for name in (*truth.METHODS, *truth.KINDS))
    assert names(tuple(truth.METHODS), "main", truth.MAIN) == ["ito", "diffedit", "sdedit", "iedit", "p2p", "ddpm", "ip2p", "controlnet",
                                                               "controlnet-diffedit", "t2i-adapter", "t2i-adapter-diffedit", "round trip of the target"]  # fmt: skip


def test_an_unknown_kind_is_a_usage_error_that_names_the_known_ones() -> None:
    result = CliRunner().invoke(main, ["evaluate", "truth", "--kinds", "pose,shape"])
    assert result.exit_code == 2
    assert "'shape' is not one of thing, colour, background, pose, scribble" in result.output


def pie_folder(folder: Path) -> Path:
    """PIE-Bench's shape: two pictures of the world, a mask of a run each row."""
    mapping = {}
    for i, case in enumerate(truth.edit_cases("thing", 3)):
        path = folder / "annotation_images" / f"{i}_kind" / f"{i:012d}.png"
        path.parent.mkdir(parents=True)
        case.source.save(path)
        runs = [v for row in range(40, 110) for v in (row * 128 + 20, 80)]
        mapping[f"{i:012d}"] = {"image_path": f"{i}_kind/{i:012d}.png", "original_prompt": case.prompts[0], "editing_prompt": case.prompts[1],
                                "editing_instruction": "", "editing_type_id": str(i), "mask": runs}  # fmt: skip
    (folder / "mapping_file.json").write_text(json.dumps(mapping))
    return folder


def invoke(*words: Any) -> Result:
    return CliRunner().invoke(main, ["evaluate", *map(str, words)])


def test_pie_writes_rows_pictures_results_and_sheets_and_goes_on(tmp_path: Path) -> None:
    folder, out = pie_folder(tmp_path / "pie"), tmp_path / "out"
    words = ("pie", folder, "--method", "sdedit", "--method", "ito", "--preset", "faster", "--steps", 2, "--n", 2, "--output", out, "--backend", "torch")  # fmt: skip
    done = invoke(*words)
    assert done.exit_code == 0, done.output
    results = json.loads((out / "results.json").read_text())
    summary = {(s["kind"], s["method"]): s for s in results["summary"]}
    assert set(summary) == {(k, m) for k in ("all", "random", "change object") for m in ("sdedit", "ito-faster")}
    one = summary["all", "sdedit"]
    assert (
        one["n"] == 2 and one["psnr_kept_low"] <= one["psnr_kept"] <= one["psnr_kept_high"] and one["evaluations"] > 0
    )
    assert results["digests"].keys() == {"clip"} and results["settings"]["steps"] == 2
    assert {"psnr_kept", "mse_kept", "ssim_kept", "clip_whole", "clip_edited"} <= one.keys() and "lpips" not in one
    pictures = sorted(p.relative_to(out / "pictures").parts for p in (out / "pictures").rglob("*.png"))
    assert [(p[0].rpartition("-")[0], *p[1:]) for p in pictures] == [
        (m, f"{i}_kind", f"{i:012d}.png") for m in ("ito-faster", "sdedit") for i in range(2)
    ]
    assert Image.open(out / "sdedit.png").height > 200 and (out / "ito-faster.png").is_file()
    edited = next(p for p in (out / "pictures").rglob("0_kind/*.png") if "sdedit" in str(p))
    source = Image.open(folder / "annotation_images" / "0_kind" / "000000000000.png")
    assert Image.open(edited).size == source.size and edited.read_bytes() != source.tobytes()
    stamps = {p: p.stat().st_mtime_ns for p in (out / "pictures").rglob("*.png")}
    assert invoke(*words).exit_code == 0
    assert {p: p.stat().st_mtime_ns for p in (out / "pictures").rglob("*.png")} == stamps
    root = edited.parent.parent
    elsewhere = invoke("pie", folder, "--pictures", f"mine={root}", "--n", 2, "--output", tmp_path / "mine")
    assert elsewhere.exit_code == 0, elsewhere.output
    (again,) = [
        s for s in json.loads((tmp_path / "mine" / "results.json").read_text())["summary"] if s["kind"] == "all"
    ]
    assert all(again[k] == one[k] for k in ("psnr_kept", "ssim_kept", "clip_whole", "clip_edited", "l1"))


def test_pairs_and_imagenet_with_every_kind_of_network(tmp_path: Path, small_models: Any) -> None:
    case = truth.edit_cases("thing", 1)[0]
    classes = ("red car", "blue boat")
    small_models.classifier(tmp_path / "judge", classes)
    small_models.vit(tmp_path / "dino")
    for name in classes:
        (tmp_path / "val" / name).mkdir(parents=True)
        case.source.save(tmp_path / "val" / name / "0.png")
    (tmp_path / "q.csv").write_text(
        "path,source,target\nred car/0.png,red car,blue boat\nblue boat/0.png,blue boat,red car\n"
    )
    common = ("--steps", 2, "--size", 64, "--backend", "torch", "--pickscore", "picturebook", "--features", "picturebook", "--structure", tmp_path / "dino")  # fmt: skip
    words = ("imagenet", tmp_path / "val", "--queries", tmp_path / "q.csv", "--classifier", tmp_path / "judge", "--method", "sdedit",
             "--method", "iedit", "--output", tmp_path / "im", *common)  # fmt: skip
    done = invoke(*words)
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "im" / "results.json").read_text())["summary"]
    assert [s["method"] for s in summary] == ["sdedit", "iedit"]
    assert sum(s["preference"] for s in summary) == pytest.approx(1)
    for one in summary:
        assert one["csfid"] > 0 and one["structure"] > 0 and "fid" not in one
        assert 0 <= one["new"] <= 1 and one["new"] + one["old"] == 1  # of two classes, one is seen
    case.source.save(tmp_path / "val" / "a.png")
    (tmp_path / "val" / "pairs.csv").write_text(f"image,prompt\na.png,{case.prompts[1]}\n")
    done = invoke("pairs", tmp_path / "val", "--method", "iedit", "--output", tmp_path / "pairs", *common)
    assert done.exit_code == 0, done.output
    assert "fid: 1 picture has no spread" in done.stderr
    (one,) = json.loads((tmp_path / "pairs" / "results.json").read_text())["summary"]
    assert 0 <= one["clip_score"] <= 2.5 and one["ssim_m"] is None  # there is no mask


def test_agreement_writes_correlations_and_the_tables_of_a_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the bootstrap finds is test_agreement.py's; here ten draws of it show where its intervals go.
    monkeypatch.setattr(measure, "correlations", functools.partial(measure.correlations, draws=10))
    classifier.Classifier().save(tmp_path / "reader.safetensors")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- agreement -->\nold\n<!-- /agreement -->\nafter\n")
    words = ("agreement", "--n", 2, "--method", "sdedit", "--method", "sdedit-0.4", "--steps", 2, "--backend", "torch", "--reader",
             tmp_path / "reader.safetensors", "--output", tmp_path / "out", "--write", page)  # fmt: skip
    done = invoke(*words)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "agreement.json").read_text())
    assert found["cases"] == 6 and found["methods"] == ["sdedit", "sdedit-0.4"]
    metrics = {r["metric"] for r in found["rows"]}
    assert {"L1", "SSIM kept", "CLIPScore", "FID (reader)", "FID (CLIP)"} <= metrics
    assert all(r["spearman"] is None or -1 <= r["spearman"] <= 1 for r in found["rows"])
    text = page.read_text()
    assert (
        text.startswith("before\n<!-- agreement -->\nSingle edits:")
        and text.endswith("<!-- /agreement -->\nafter\n")
        and "old" not in text
    )
    page.write_text("no marks")
    refused = invoke(*words)
    assert refused.exit_code == 2 and "has no place for the tables" in refused.stderr
    one = invoke(*words[:5], *words[7:-2])
    assert one.exit_code == 2 and "give at least two methods" in one.stderr
    other = invoke(
        "agreement", "--method", "warp", "--reader", tmp_path / "reader.safetensors", "--output", tmp_path / "out"
    )
    assert other.exit_code == 2 and "'warp' is not one of ito, ito-lambda-1" in other.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["agreement", "--n", "1"], "1 is not in the range"),
        (["pie", "{}"], "holds no mapping_file.json"),
        (["pie", "{}", "--method", "controlnet"], "method controlnet: needs layouts"),
        (["pie", "{}", "--method", "sdedit", "--preset", "fast"], "--preset: only ito has presets"),
        (["pie", "{}", "--pictures", "ito=nowhere"], "--pictures: nowhere is not a folder"),
        (["pie", "{}", "--method", "ito", "--pictures", "ito={}"], "'ito' is a method that is run"),
        (["pie", "{}", "--pictures", "../x={}"], "holds more than letters"),
        (["pie", "{}", "--lpips", "none.pth"], "lpips: none.pth cannot be read"),
        (["pie", "{}", "--structure", "none"], "structure: none is not a folder"),
        (["pairs", "{}", "--clip", "none", "--real", "{}"], "holds no picture to compare"),
        (["imagenet", "{}", "--queries", "{}/none.csv"], "cannot be read"),
        (["truth", "--reader", "none.safetensors"], "iedit train classifier"),
        (["pies", "{}"], "No such command 'pies'"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_one_line_and_exit_code_2(tmp_path: Path, words: list[str], says: str) -> None:
    result = invoke(
        *(w.replace("{}", str(tmp_path)) for w in words),
        *(["--output", tmp_path / "out"] if "pies" not in words else []),
    )
    assert result.exit_code == 2, result.output
    assert says in result.stderr and not (tmp_path / "out").exists()


class Editor:
    """Stands in for the runtime: knows the cases of the suite by their pictures and returns the exact target."""

    asked: ClassVar[list[editor.EditRequest]] = []
    instructs: ClassVar[bool] = False
    controlnets: ClassVar[tuple[str, ...]] = ("pose", "scribble")
    adapters: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def load(cls, model: str, backend: str, cache: Any, engines: Any) -> Editor:
        assert cache.memory == 0  # methods are compared by their cost
        return cls()

    @property
    def model(self) -> Any:
        return SimpleNamespace(
            digest="0123456789abcdef",
            guidance_scale=5.0,
            mask_strength=None,
            mask_threshold=None,
            text_update_share=None,
            guidance_until=None,
            guidance_path=None,
            mask_seeds=None,
            instructs=self.instructs,
            controlnets=dict.fromkeys(self.controlnets),
            adapters=dict.fromkeys(self.adapters),
            lambda_area=None,
        )

    def edit_many(self, requests: list[editor.EditRequest]) -> list[Any]:
        assert all((r.method == "ip2p") == self.instructs for r in requests)  # as `runtime.request` has it
        self.asked.extend(requests)
        known = {(c.source.tobytes(), c.prompts[1]): c for k in truth.KINDS for c in truth.edit_cases(k, 2)}
        cases = [known[r.image.tobytes(), r.prompt] for r in requests]
        profile = SimpleNamespace(evaluations={"final": 50})
        return [
            SimpleNamespace(
                image=c.target, mask=c.region, guidance=c.target if r.options.lam != 1 else None, profile=profile
            )
            for r, c in zip(requests, cases, strict=True)
        ]

    def reconstruct(self, images: list[Image.Image]) -> list[Image.Image]:
        return images


def test_the_truth_command_runs_every_method_on_its_kinds_and_writes_card_rows_and_sheets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(editor, "Editor", Editor)
    monkeypatch.setattr(Editor, "asked", [])
    monkeypatch.setattr(truth, "crispness", lambda *_: 20.0)  # searches long where a reader sees nothing
    reader, output = tmp_path / "reader.safetensors", tmp_path / "out"
    classifier.Classifier().save(reader)
    arguments = ["truth", "--reader", str(reader), "--output", str(output), "--n", "2"]
    result = CliRunner().invoke(evaluate, [*arguments, "--methods", "all", "--sheet", "1"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    counted = Counter((request.method, request.options) for request in Editor.asked)
    fit = [m for m in truth.METHODS.values() if m.name != "ip2p" and not m.name.startswith("t2i-adapter")]
    methods = [m for m in fit if m.method]
    wanted = Counter((m.method, editor.Options(**m.options)) for m in methods for _ in range(2 * len(m.kinds)))
    assert counted == wanted  # two of them differ only in what is judged
    for request in Editor.asked:
        assert set(request.layouts) == set(request.source_layouts) <= {"pose", "scribble"}
        assert (request.mask is not None) == (request.method == "iedit")
    assert len(list(output.glob("*.png"))) == sum(len(m.kinds) for m in fit)
    assert "### Edits of held-out scenes" in (output / "card.md").read_text()
    assert json.loads((output / "figures.json").read_text())["edits"][0]["n"] == 2
    CliRunner().invoke(evaluate, arguments, catch_exceptions=False)
    assert len(Editor.asked) == sum(counted.values())  # nothing was run again
    plain = CliRunner().invoke(
        evaluate, [*arguments, "--output", str(tmp_path / "plain"), "--n", "1"], catch_exceptions=False
    )
    assert plain.exit_code == 0  # by default each method as it is by default
    main_ones = [m for m in methods if m.name in truth.MAIN]
    assert len(Editor.asked) == sum(counted.values()) + sum(len(m.kinds) for m in main_ones)
    refused = CliRunner().invoke(main, ["evaluate", *arguments, "--methods", "ito,ip2p"])
    assert (
        refused.exit_code == 2
        and "'ip2p' cannot be run, picturebook is no InstructPix2Pix checkpoint" in refused.stderr
    )


def test_of_an_instructing_checkpoint_the_truth_command_runs_ip2p_and_refuses_what_else_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(editor, "Editor", Editor)
    monkeypatch.setattr(Editor, "asked", [])
    monkeypatch.setattr(Editor, "instructs", True)
    monkeypatch.setattr(truth, "crispness", lambda *_: 20.0)
    reader = tmp_path / "reader.safetensors"
    classifier.Classifier().save(reader)
    words = [
        "evaluate",
        "truth",
        "--model",
        "mine",
        "--reader",
        str(reader),
        "--output",
        str(tmp_path / "out"),
        "--n",
        "2",
    ]
    refused = CliRunner().invoke(main, [*words, "--methods", "ip2p,sdedit"])
    assert refused.exit_code == 2 and "'sdedit' cannot be run, mine is an InstructPix2Pix checkpoint" in refused.stderr
    assert not Editor.asked and not (tmp_path / "out").exists()
    for methods in ("main", "all", "ip2p"):
        assert CliRunner().invoke(main, [*words, "--methods", methods]).exit_code == 0
    assert Counter(r.method for r in Editor.asked) == {"ip2p": 2 * len(truth.TEXT_KINDS)}
    rows = workers.read_rows(tmp_path / "out" / "cases.csv", truth.WORDS, truth.WHOLE)
    assert {(r["method"], r["kind"]) for r in rows} == {("ip2p", k) for k in truth.TEXT_KINDS} | {
        ("round trip of the target", k) for k in truth.KINDS
    }


def test_a_layout_that_a_t2i_adapter_reads_has_rows_by_that_name_and_the_other_keeps_the_controlnets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(editor, "Editor", Editor)
    monkeypatch.setattr(Editor, "asked", [])
    monkeypatch.setattr(Editor, "controlnets", ("scribble",))
    monkeypatch.setattr(Editor, "adapters", ("pose",))
    monkeypatch.setattr(truth, "crispness", lambda *_: 20.0)
    reader, output = tmp_path / "reader.safetensors", tmp_path / "out"
    classifier.Classifier().save(reader)
    words = ["evaluate", "truth", "--model", "mine", "--reader", str(reader), "--output", str(output), "--n", "1"]
    for asked, says in (
        (
            ("controlnet,ito", "pose"),
            "'controlnet' cannot be run, mine has no ControlNet that reads pose; leave it out, ask for t2i-adapter, or",
        ),
        (
            ("t2i-adapter-diffedit", "scribble,thing"),
            "has no T2I-Adapter that reads scribble; leave it out, ask for controlnet-diffedit, or",
        ),
        (("ip2p", "thing"), "mine is no InstructPix2Pix checkpoint"),
    ):
        refused = CliRunner().invoke(main, [*words, "--methods", asked[0], "--kinds", asked[1]])
        assert refused.exit_code == 2 and says in refused.stderr, refused.stderr
    assert not Editor.asked and not output.exists()
    wanted = {
        ("controlnet", "scribble"),
        ("controlnet-diffedit", "scribble"),
        ("t2i-adapter", "pose"),
        ("t2i-adapter-diffedit", "pose"),
    }
    names_of_rows = {m for m, _ in wanted}
    for methods in (",".join(sorted(names_of_rows)), "main"):
        output = tmp_path / methods[:4]
        done = CliRunner().invoke(
            main, [*words, "--output", str(output), "--methods", methods, "--kinds", "pose,scribble"]
        )
        assert done.exit_code == 0, done.output
        rows = workers.read_rows(output / "cases.csv", truth.WORDS, truth.WHOLE)
        assert {(r["method"], r["kind"]) for r in rows if r["method"] in names_of_rows} == wanted
        assert {r["kind"] for r in rows if r["method"] == "ito"} == (
            {"pose", "scribble"} if methods == "main" else set()
        )
        assert "t2i-adapter-diffedit" in (output / "card.md").read_text()
    # Nothing reads outlines: no method is asked for them.
    monkeypatch.setattr(Editor, "controlnets", ())
    monkeypatch.setattr(Editor, "asked", [])
    refused = CliRunner().invoke(main, [*words, "--methods", "ito", "--kinds", "scribble"])
    assert (
        refused.exit_code == 2
        and "has no ControlNet or T2I-Adapter that reads scribble; leave it out, or" in refused.stderr
    )
    output = tmp_path / "one"
    done = CliRunner().invoke(main, [*words, "--output", str(output), "--methods", "main"])
    assert done.exit_code == 0, done.output
    assert "scribble" not in {name for request in Editor.asked for name in request.layouts} and Editor.asked


@pytest.mark.slow
def test_the_truth_suite_gives_the_same_figures_twice_in_one_process_or_in_two(tmp_path: Path) -> None:
    classifier.Classifier().save(tmp_path / "reader.safetensors")
    rows = []
    for name, processes in (("one", 1), ("two", 2)):
        done = invoke("truth", "--reader", tmp_path / "reader.safetensors", "--output", tmp_path / name, "--n", 2, "--kinds", "background",
                      "--methods", "sdedit", "--steps", 2, "--batch", 1, "--processes", processes)  # fmt: skip
        assert done.exit_code == 0, done.output
        found = workers.read_rows(tmp_path / name / "cases.csv", truth.WORDS, truth.WHOLE)
        rows.append(sorted(str({k: v for k, v in row.items() if k != "seconds"}) for row in found))
    assert rows[0] == rows[1] and len(rows[0]) == 2
