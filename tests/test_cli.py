import importlib
import json
import re

import pytest
from typer.testing import CliRunner

from omnifx.cli import app, folded
from omnifx.example_inputs import RECIPES, build_model, example_inputs
from omnifx.explainer import explain
from omnifx.pictures import Samples, kinds_of_steps, plan_figure, samples_figure, save_figure
from omnifx.plan import Correction, Plan, PlanStep
from omnifx.policies.omnicache import OmniCache
from omnifx.policies.taylorseer import TaylorSeer
from omnifx.policy import policies
from tests.compared import compared
from tests.profiles import make_profile

TINY_DIT = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8}

SMALL = {
    "CogVideoXTransformer3DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "time_embed_dim": 8,
        "text_embed_dim": 16,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 9,
        "use_rotary_positional_embeddings": True,
    },
    "DiTTransformer2DModel": TINY_DIT,
    "FluxTransformer2DModel": {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
        "axes_dims_rope": [4, 4, 8],
        "guidance_embeds": True,
    },
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "caption_channels": [8, 4],
        "text_emb_dim": 8,
        "num_routed_experts": 2,
        "axes_dims_rope": [4, 2, 2],
        "max_resolution": [16, 16],
        "llama_layers": [0, 1, 0, 1],
    },
    "LatteTransformer3DModel": {
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "sample_size": 8,
        "patch_size": 2,
        "caption_channels": 16,
        "cross_attention_dim": 16,
        "norm_elementwise_affine": False,
        "video_length": 4,
    },
    "PixArtTransformer2DModel": {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "sample_size": 8,
        "cross_attention_dim": 16,
    },
    "SD3Transformer2DModel": {
        "sample_size": 8,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "caption_projection_dim": 32,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
    },
    "WanTransformer3DModel": {
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "ffn_dim": 32,
        "text_dim": 16,
    },
}


def run(*arguments, status=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, (result.output, result.exception)
    return result


@pytest.fixture
def profile_path(tmp_path):
    path = tmp_path / "profile.safetensors"
    make_profile(20).save(path)
    return path


def test_the_version_is_told():
    assert re.match(r"omnifx \d+\.\d+\.\d+, torch ", run("--version").output)


def test_without_a_command_the_help_is_shown():
    shown = CliRunner().invoke(app, []).output

    assert all(command in shown for command in ("demo", "explain", "calibrate", "plan", "policies", "doctor"))


def test_policies_are_listed_with_what_they_do():
    shown = run("policies").output

    assert "fora" in shown
    assert "Curvature decides when to reuse" in shown
    assert "interval=None" in shown


def test_the_doctor_names_what_is_here_and_what_to_do_where_not():
    shown = run("doctor", "--no-compile").output

    for subject in ("Python", "torch", "C++ compiler", "diffusers", "tensorrt", "profile cache", "memory"):
        assert subject in shown
    assert "all that omnifx needs is here" in shown or "to mend: " in shown


def test_the_doctor_calls_an_unusable_cache_folder_and_a_missing_compiler_problems(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("CXX", "no-such-compiler")

    shown = run("doctor", "--no-compile").output

    assert "to mend: C++ compiler, profile cache" in shown


@pytest.mark.slow
def test_the_doctor_compiles_for_real():
    assert "compiled and ran a small function" in re.sub(r"[\s│]+", " ", run("doctor").output)


# -- explain -----------------------------------------------------------------------------------------------------------


def test_explaining_a_class_folds_equal_branches():
    shown = run("explain", "DiTTransformer2DModel", "--config", json.dumps(TINY_DIT)).output

    assert "4 of 4 branches cacheable" in shown
    assert re.search(r"transformer_blocks\.\*\.attn1 +self_attention +2 ", shown)
    assert "input hidden_states: latents" in shown


def test_a_config_may_be_a_file_and_the_report_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"_class_name": "DiTTransformer2DModel", **TINY_DIT}))

    shown = run("explain", "DiTTransformer2DModel", "--config", path, "--json").stdout

    assert [branch["kind"] for branch in json.loads(shown)["branches"]] == ["self_attention", "mlp"] * 2


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_its_model(name):
    model = build_model(name, SMALL[name])
    size = {
        "FluxTransformer2DModel": (8, 8),
        "HiDreamImageTransformer2DModel": (8, 8),
        "WanTransformer3DModel": (2, 8, 8),
    }.get(name)

    report = explain(model, **example_inputs(model, size=size, batch=2))

    assert (report.graphs, report.breaks) == (1, ())
    assert bool(report.kept_whole) == (name == "HiDreamImageTransformer2DModel")
    assert len(report.cacheable) >= 2
    assert f"of {len(report.branches)} branches" in folded(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "PixArtTransformer2DModel"])
def test_a_class_is_explained_at_its_real_size_without_memory(name):
    model = build_model(name)

    report = explain(model, **example_inputs(model))

    assert len(report.cacheable) == len(report.branches) == 28 * (2 if name.startswith("DiT") else 3)


def test_a_model_of_ones_own_is_explained(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import torch\nfrom omnifx.example_inputs import build_model, example_inputs\n"
        "def make():\n"
        f"    model = build_model('DiTTransformer2DModel', {TINY_DIT})\n"
        "    return model, example_inputs(model)\n"
        "def inputs(model):\n    return example_inputs(model, size=(8, 8))\n"
        "def wrong():\n    return 3\n"
        "def misfit():\n"
        "    model, kwargs = make()\n"
        "    return model, kwargs | {'hidden_states': torch.ones(1, 3, 8, 8)}\n"
    )

    assert "4 of 4" in run("explain", f"{path}:make", "--all").output
    own = run("explain", "DiTTransformer2DModel", "--config", json.dumps(TINY_DIT), "--inputs", f"{path}:inputs")
    assert "4 of 4" in own.output
    assert "the model could not be captured: " in run("explain", f"{path}:misfit", status=2).stderr
    assert "returned int, expected (model, kwargs" in run("explain", f"{path}:wrong", status=2).stderr
    assert (
        "no function missing; it has build_model, example_inputs" in run("explain", f"{path}:missing", status=2).stderr
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["PixArtTransfomer2DModel"], "Did you mean PixArtTransformer2DModel"),
        (["DiTTransformer2DModel", "--config", "{"], "--config is not JSON"),
        (["DiTTransformer2DModel", "--config", "missing.json"], "neither JSON nor a file"),
        (["DiTTransformer2DModel", "--config", '{"no_such": 1}'], "does not take the config"),
        (["DiTTransformer2DModel", "--size", "0x4"], "--size must be such as 64"),
        (["DiTTransformer2DModel", "--size", "2x4x4"], "names 3 sides, this model has 2"),
        (["DiTTransformer2DModel", "--size", "4x8"], "takes squares only"),
        (["AutoencoderKL"], "no inputs are known for AutoencoderKL"),
        (["no_such_module:make"], "there is no module no_such_module"),
        (["missing.py:make"], "there is no file missing.py"),
        (["missing.py:make", "--size", "8"], "--size is for classes of diffusers"),
    ],
)
def test_what_cannot_be_explained_is_one_message(arguments, message):
    result = run("explain", *arguments, status=2)

    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_page_is_written_beside_the_table(tmp_path):
    page = tmp_path / "page.html"
    arguments = ["explain", "DiTTransformer2DModel", "--config", json.dumps(TINY_DIT), "--html", page]

    shown = run(*arguments)
    as_json = run(*arguments, "--json")

    assert shown.stdout.endswith(f"wrote {page}\n")
    assert "4 of 4 branches can be reused" in page.read_text(encoding="utf-8")
    assert len(json.loads(as_json.stdout)["branches"]) == 4


def test_a_page_that_cannot_be_written_is_one_message(tmp_path):
    dit = ["explain", "DiTTransformer2DModel", "--config", json.dumps(TINY_DIT), "--html"]

    assert "could not be written: Is a directory" in run(*dit, tmp_path, status=2).stderr
    assert "mkdir -p" in run(*dit, tmp_path / "missing" / "page.html", status=2).stderr


def test_a_model_without_branches_is_an_error_that_says_what_was_seen(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text(
        "import torch\nfrom torch import nn\n"
        "class Plain(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)\n"
        "    def forward(self, x, t):\n"
        "        return self.b(self.a(x).relu()) + t\n"
        "def make():\n    return Plain().eval(), {'x': torch.ones(1, 4, 8, 8), 't': torch.ones(1, 4, 1, 1)}\n"
    )

    told = run("explain", f"{path}:make", "--html", tmp_path / "page.html", status=2).stderr

    assert "no branch of Plain can be reused" in told
    assert "those that cost FLOPs: 2 convolutions" in told
    assert "none among 1 addition(s) (1 where the operands descend from different inputs)" in told
    assert not (tmp_path / "page.html").exists()


# -- report ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def results_path(tmp_path):
    results, samples = compared()
    results.save(tmp_path / "found", samples)
    return tmp_path / "found"


def test_results_are_told_as_tables(results_path):
    shown = run("report", results_path).stdout

    assert "ahead of every other way at 3 of 3 shares" in shown
    assert "diffusers FirstBlockCache" in shown
    assert "refused: cache-dit SCM" in shown
    assert "wrote" not in shown


def test_a_report_is_written_as_page_figures_and_markdown(results_path, tmp_path):
    page, figures, words = tmp_path / "page.html", tmp_path / "docs" / "figures", tmp_path / "page.md"
    words.write_text("# Mine\n\nBefore.\n")
    more = ["--figures", figures, "--markdown", words]

    shown = run("report", results_path / "results.json", "--html", page, *more).stdout

    assert f"wrote {page}" in shown
    assert page.read_text(encoding="utf-8").count("<img") > 10
    assert "![Digits: plans](docs/figures/digits-plans.png)" in words.read_text(encoding="utf-8")
    assert words.read_text(encoding="utf-8").startswith("# Mine\n\nBefore.\n\n<!-- measured: omnifx report Frontier")
    assert (figures / "digits-plans.png").is_file()
    run("report", results_path, *more, "--check")
    words.write_text(words.read_text(encoding="utf-8").replace("44.0", "99.9"))
    assert "does not hold what" in run("report", results_path, *more, "--check", status=2).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "cannot read nowhere"),
        (["{}", "--html", "missing/page.html"], "mkdir -p missing"),
        (["{}", "--html", "."], "could not be written: Is a directory"),
        (["{}", "--figures", "{}/results.json"], "could not be made"),
        (["{}", "--markdown", "."], "could not be written: Is a directory"),
        (["{}", "--check"], "give --markdown FILE"),
    ],
)
def test_a_report_that_cannot_be_made_is_one_message(arguments, message, results_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    result = run("report", *(argument.format(results_path) for argument in arguments), status=2)

    assert message in result.stderr
    assert "Traceback" not in result.output


# -- calibrate and plan ------------------------------------------------------------------------------------------------


def test_a_plan_is_printed_written_and_drawn(profile_path, tmp_path):
    out, picture = tmp_path / "plan.json", tmp_path / "plan.png"

    shown = run("plan", profile_path, "--policy", "fora", "--speedup", 2, "--out", out, "--picture", picture).output

    assert "fora: 20 steps, 10 reuse" in shown
    assert "FrFrFrFrFrFrFrFrFrFr" in shown
    assert Plan.load(out).num_reuse_steps == 10
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "none"], re.escape(f"expected one of {list(policies())}")),
        (["--speedup", "50"], r"speedup must be in \[1, "),
        (["--speedup", "0.5"], "speedup must be a number >= 1"),
        (["--out", "no/such/folder/plan.json"], "mkdir -p no/such/folder"),
        (["--picture", "plan.nonsense"], "could not be written"),
    ],
)
def test_a_plan_that_cannot_be_made_is_one_message(profile_path, arguments, message):
    assert re.search(message, run("plan", profile_path, *arguments, status=2).stderr)


def test_a_file_that_is_no_profile_is_refused(tmp_path):
    (tmp_path / "junk").write_text("junk")

    assert "is corrupt" in run("plan", tmp_path / "junk", status=2).stderr
    assert "cannot read" in run("plan", tmp_path / "missing", status=2).stderr


TINY_SCRIPT = (
    "import torch\n"
    "from diffusers import DiTTransformer2DModel\n"
    f"def make():\n    return DiTTransformer2DModel(**{TINY_DIT}).eval(), generate\n"
    "def generate(model, seed):\n"
    "    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))\n"
    "    labels = torch.tensor([1])\n"
    "    for t in range(900, 0, -100):\n"
    "        time = torch.tensor([t])\n"
    "        x = x - 0.05 * model(x, timestep=time, class_labels=labels, return_dict=False)[0][:, :4]\n"
)


def test_a_model_is_calibrated_and_planned(tmp_path):
    script, out = tmp_path / "tiny.py", tmp_path / "tiny.safetensors"
    script.write_text(TINY_SCRIPT)

    shown = run("calibrate", f"{script}:make", "--out", out, "--lowering", "eager").output

    assert "1 run(s) of 9 steps" in shown
    assert "auto: 9 steps" in run("plan", out, "--speedup", 1.2).output


def test_a_policy_that_decides_at_run_time_is_calibrated_and_not_planned(tmp_path):
    script, out = tmp_path / "tiny.py", tmp_path / "tea.safetensors"
    script.write_text(TINY_SCRIPT)
    arguments = ["calibrate", f"{script}:make", "--out", out, "--lowering", "eager", "--runs", 2]

    shown = run(*arguments, "--policy", "teacache").output

    assert "2 run(s) of 9 steps" in shown
    assert re.search(r"teacache: the polynomial \(.*\) was fitted to 14 steps", shown)
    assert f"options={{'policy': 'teacache', 'profile': '{out}'}}" in shown
    assert "signals that policy 'teacache' learns from" in run("plan", out, status=2).stderr
    assert "learns nothing of a model" in run(*arguments, "--policy", "dbcache", status=2).stderr


def test_a_factory_that_gives_no_generate_is_refused(tmp_path):
    script = tmp_path / "wrong.py"
    script.write_text("def make():\n    return 1, 2\n")

    assert "returned (int, int), expected (model, generate)" in run("calibrate", f"{script}:make", status=2).stderr


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_every_kind_of_step_is_told_apart():
    plan = OmniCache().plan(make_profile(12), speedup=1.5)
    row = plan.steps[plan.rows.index(("reuse", "reuse"))].variant
    steps = (
        plan.steps[0],
        PlanStep(variant=row),
        PlanStep(variant=row, correction=Correction(gamma=1.0)),
        *plan.steps[3:],
    )
    mixed = (*plan.variants, ("compute", "reuse"))
    made = plan.model_copy(update={"steps": (*steps[:-1], PlanStep(variant=2)), "variants": mixed})

    kinds = kinds_of_steps(made)

    assert kinds[:3] == ["full", "reuse", "corrected"]
    assert kinds[-1] == "mixed"


def test_predictions_are_told_apart_from_reuse():
    made = TaylorSeer(interval=3).plan(make_profile(9))

    assert kinds_of_steps(made) == ["full"] * 3 + ["predict", "predict", "full", "predict", "predict", "full"]
    shown = [text.get_text() for text in plan_figure(made).legends[0].get_texts()]
    assert "prediction from stored values (4)" in shown


def test_pictures_do_not_touch_pyplot(tmp_path):
    import sys

    import torch

    images = torch.rand(7, 1, 8, 8)
    plan = OmniCache().plan(make_profile(12))

    save_figure(plan_figure(plan), tmp_path / "plan.png")
    save_figure(samples_figure(Samples("a", images), [Samples("b", images + 0.01)]), tmp_path / "samples.png")

    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


# -- demo --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "1"], "steps must be >= 2"),
        (["--samples", "1"], "samples must be >= 2"),
        (["--speedup", "0.5"], "speedup"),
    ],
)
def test_a_demo_that_cannot_run_is_one_message(tmp_path, arguments, message):
    assert message in run("demo", "--out", tmp_path / "out", *arguments, status=2).stderr


def test_outside_a_checkout_the_demo_says_so(tmp_path, monkeypatch):
    import omnifx.demo

    real = importlib.import_module

    def missing(name, *rest):
        if not name.startswith("examples."):
            return real(name, *rest)
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(omnifx.demo.importlib, "import_module", missing)

    assert "Run `omnifx demo` from a checkout" in run("demo", "--out", tmp_path, status=2).stderr


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dit", "flow"])
def test_the_demo_runs_and_a_second_one_shows_the_same(tmp_path, model):
    tiny = ["--model", model, "--steps", 8, "--samples", 4, "--repeats", 2, "--speedup", 1.3, "--lowering", "eager"]

    shown = run("demo", "--out", tmp_path / "a", *tiny).output
    run("demo", "--out", tmp_path / "b", *tiny)

    found, again = (json.loads((tmp_path / name / "results.json").read_text()) for name in "ab")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "plan.png",
        "grids.png",
        "results.json",
        "plan.json",
        "profile.safetensors",
    }
    assert all(str(tmp_path / "a" / name) in shown for name in ("plan.png", "grids.png"))
    assert [row["name"] for row in found["rows"]] == ["uncached", "omnifx", "fewer steps"]
    assert found["rows"][1]["flops_ratio"] >= 1.3
    assert found["rows"][1]["psnr"] > 20
    assert found["unplanned_full_steps"] == {}
    assert [row["psnr"] for row in found["rows"]] == [row["psnr"] for row in again["rows"]]
