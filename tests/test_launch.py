"""The launch scripts: clean shell, the commands that they would run, and what they do when a run ends.

The cloud's and the cluster's own commands are played by small scripts that note how they were called.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api.models.io_k8s_api_batch_v1_job import IoK8sApiBatchV1Job
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from tghmoe_jax import predict

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
TRAIN = ["--", "--config", "configs/stage1.py:phi3v", "--config.note=two words", "--workdir", "gs://bucket/runs/stage1"]


def launch(script: str, *arguments: str, env=None) -> subprocess.CompletedProcess:
    command = [sys.executable] if script.endswith(".py") else ["bash"]
    return subprocess.run(
        [*command, str(LAUNCH / script), *arguments], capture_output=True, text=True, timeout=60, cwd=ROOT,
        env=os.environ | (env or {}),
    )  # fmt: skip


def played(folder: Path, **commands: str) -> dict[str, str]:
    """An environment in which each command appends its arguments to `folder`/calls and continues as its script says."""
    for name, script in commands.items():
        file = folder / name
        file.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "{name} $*" >> {folder}/calls\n{script}\n')
        file.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "POLL": "0"}


def test_the_scripts_pass_shellcheck():
    scripts = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")]
    assert len(scripts) >= 3
    done = subprocess.run(
        [str(Path(sys.executable).parent / "shellcheck"), *map(str, scripts)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout


def test_no_cloud_is_named_outside_launch():
    words = ("gcloud", "kubectl", "google.com", "sbatch", "srun")
    found = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in [*ROOT.glob("tghmoe_jax/**/*.py"), *ROOT.glob("configs/**/*.py")]
        for word in words
        if word in path.read_text() and not path.name == "chips.py"  # cites where its numbers are from
    ]
    assert not found


def test_the_cloud_s_own_name_of_a_type_is_taken():
    flags = ("--name", "pod", "--zone", "z", "--dry-run", "--type")
    own, cloud = (launch("tpu_pod.sh", "create", *flags, name) for name in ("v5e-64", "v5litepod-64"))
    assert own.returncode == 0 and cloud.stdout == own.stdout and "--accelerator-type v5litepod-64 " in own.stdout


@pytest.mark.parametrize("name, script, arguments", [
    ("tpu_pod_create", "tpu_pod.sh", ["create", "--type", "v5e-64", "--spot"]),
    ("tpu_pod_setup", "tpu_pod.sh", ["setup", "--project", "own"]),
    ("tpu_pod_train", "tpu_pod.sh", ["train", *TRAIN]),
    ("tpu_pod_status", "tpu_pod.sh", ["status"]),
    ("tpu_pod_logs", "tpu_pod.sh", ["logs"]),
    ("tpu_pod_delete", "tpu_pod.sh", ["delete"]),
    ("local_pod", "local_pod.sh", ["2", "4", "--dry-run", *TRAIN]),
])  # fmt: skip
def test_a_dry_run_prints_the_commands(name, script, arguments):
    if script == "tpu_pod.sh":
        arguments = [arguments[0], "--name", "pod", "--zone", "us-west4-a", "--dry-run", *arguments[1:]]
    done = launch(script, *arguments, env={"PYTHON": "python"})
    assert done.returncode == 0, done.stderr
    golden = ROOT / "tests" / "golden_launch" / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(done.stdout)
    assert done.stdout == golden.read_text(), "UPDATE_GOLDEN=1 rewrites it"


@pytest.mark.parametrize("arguments, message", [
    (["start"], "'start' is unknown"),
    (["create", "--name", "pod", "--zone", "z"], "--type"),
    (["create", "--name", "Pod", "--zone", "z", "--type", "v5e-64"], "--name Pod"),
    (["create", "--name", "pod", "--zone", "z", "--type", "v9-64"], "--runtime"),
    (["create", "--name", "pod", "--type", "v5e-64"], "--zone"),
    (["create", "--name"], "--name needs a value"),
    (["train", "--name", "pod", "--zone", "z"], "name what to run"),
    (["status", "--name", "pod", "--zone", "z", "--", "--config", "x"], "belong to train alone"),
    (["status", "--name", "pod", "--zone", "z", "--config", "x"], "'--config' is unknown"),
])  # fmt: skip
def test_a_wrong_command_line_is_one_sentence(arguments, message):
    done = launch("tpu_pod.sh", *arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("arguments, message", [
    (["2"], "name the number of processes"), (["2", "x"], "x is no number"), (["2", "4"], "name what to run"),
    (["2", "4", "--config", "x"], "come after --"),
])  # fmt: skip
def test_a_wrong_local_pod_is_one_sentence(arguments, message):
    done = launch("local_pod.sh", *arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


GCLOUD = """
state() { cat "$FOLDER/state"; }
case "$*" in
  *"queued-resources describe"*) state ;;
  *"queued-resources create"*) echo ACTIVE > "$FOLDER/state" ;;
  *"cat tghmoe.exit"*)
    round=$(cat "$FOLDER/round" 2> /dev/null || echo 0)
    echo $((round + 1)) > "$FOLDER/round"
    case $round in
      0) echo SUSPENDED > "$FOLDER/state"; exit 255 ;; # preempted: nobody answers
      1) echo 75 ;;                                    # stopped, and the slice stays
      2) exit 255 ;;                                   # the connection was lost
      *) echo "$LAST" ;;
    esac ;;
esac
"""


@pytest.mark.parametrize("last", ["0", "2"])
def test_a_preempted_run_is_created_and_started_again(tmp_path, last):
    env = played(tmp_path, gcloud=GCLOUD) | {"FOLDER": str(tmp_path), "LAST": last}
    (tmp_path / "state").write_text("ACTIVE")
    done = launch("tpu_pod.sh", "train", "--name", "pod", "--zone", "z", "--type", "v6e-16", "--spot", *TRAIN, env=env)
    assert done.returncode == int(last), done.stderr
    calls = (tmp_path / "calls").read_text()
    verbs = [line.split()[3:5] for line in calls.splitlines() if line.startswith("gcloud compute tpus ")]
    counted = {verb: verbs.count(["queued-resources", verb]) for verb in ("create", "delete")}
    assert counted == {"create": 1, "delete": 1}
    assert calls.count("-m tghmoe_jax.main") == 4, "one start a round"
    assert "--accelerator-type v6e-16 --runtime-version v2-alpha-tpuv6e --spot" in calls
    assert verbs.index(["queued-resources", "delete"]) < verbs.index(["queued-resources", "create"])
    assert verbs.index(["queued-resources", "create"]) < verbs.index(["tpu-vm", "scp"])


def test_a_preempted_run_of_unknown_type_is_not_created_again(tmp_path):
    env = played(tmp_path, gcloud=GCLOUD) | {"FOLDER": str(tmp_path), "LAST": "0"}
    (tmp_path / "state").write_text("ACTIVE")
    done = launch("tpu_pod.sh", "train", "--name", "pod", "--zone", "z", *TRAIN, env=env)
    assert done.returncode == 2 and "with --type it is created again" in done.stderr


@pytest.mark.parametrize("code, requeued", [(0, False), (2, False), (75, True)])
def test_a_slurm_job_that_was_stopped_is_queued_again(tmp_path, code, requeued):
    env = played(tmp_path, srun=f"exit {code}", scontrol="") | {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = launch("slurm.sbatch", *TRAIN[1:], env=env)
    assert done.returncode == code, done.stderr
    calls = (tmp_path / "calls").read_text()
    assert "-m tghmoe_jax.main --config configs/stage1.py:phi3v --config.note=two words" in calls
    assert ("scontrol requeue 7" in calls) == requeued


ARRAY = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MAX": "8"}


@pytest.mark.parametrize("code, requeued", [(0, False), (2, False), (143, True)])
def test_a_task_of_an_array_answers_its_shard(tmp_path, code, requeued):
    env = played(tmp_path, srun=f"exit {code}", scontrol="") | ARRAY | {"SLURM_SUBMIT_DIR": str(tmp_path)}
    done = launch("answers.sbatch", "answers", "--list", "two words.csv", env=env)
    assert done.returncode == code, done.stderr
    calls = (tmp_path / "calls").read_text()
    expected = "-m tghmoe_jax.predict --list two words.csv --shard 3/8 --to answers/shard-3.csv"
    assert expected in calls and (tmp_path / "answers").is_dir()
    assert ("scontrol requeue 7_3" in calls) == requeued


def test_answers_outside_an_array_are_refused(tmp_path):
    done = launch("answers.sbatch", "answers", "--list", "l.csv", env={"SLURM_SUBMIT_DIR": str(tmp_path)})
    assert done.returncode == 2 and "as an array" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_the_indexed_job_is_one_and_answers_its_shard():
    """... by the schema of Kubernetes' own API, and its shell line passes the flags that the parser knows."""
    job = yaml.safe_load((LAUNCH / "answers_job.yaml").read_text())
    assert IoK8sApiBatchV1Job.from_dict(job).to_dict() == job
    (container,) = job["spec"]["template"]["spec"]["containers"]
    (line,) = container["args"]
    shown = line.replace("mkdir -p /data/answers", "true").replace("exec python", "printf '%s\n' python")
    done = subprocess.run(["bash", "-c", shown], capture_output=True, text=True, env={"JOB_COMPLETION_INDEX": "2"})
    words = done.stdout.split()
    args = predict.parse(
        [word.replace("/data/answers/", "") for word in words[words.index("tghmoe_jax.predict") + 1 :]]
    )
    assert args.shard == (3, job["spec"]["completions"]) and args.to == "shard-3.csv"


# ---- the JobSet ------------------------------------------------------------------------------------------------------


def rendered(*arguments: str) -> dict:
    done = launch("gke_jobset.py", "--name", "stage1", "--image", "registry/tghmoe:1", *arguments)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def checked(manifest: dict) -> None:
    """ValueError where a field is unknown, missing or of another type in the schema of JobSet's own API."""
    read = JobsetV1alpha2JobSet.from_dict(manifest)
    if read.to_dict() != manifest:
        raise ValueError("the manifest holds a field that the schema does not know")


@pytest.mark.parametrize("topology, hosts, chips, label", [
    ("v5e:8x8", 16, 4, "tpu-v5-lite-podslice"), ("v5p:2x2x4", 4, 4, "tpu-v5p-slice"),
    ("v6e:4x4", 4, 4, "tpu-v6e-slice"), ("v5e:1x1", 1, 1, "tpu-v5-lite-podslice"),
])  # fmt: skip
def test_the_manifest_is_a_jobset_of_the_slice(topology, hosts, chips, label):
    manifest = rendered("--topology", topology, "--spot", *TRAIN)
    checked(manifest)
    (job,) = manifest["spec"]["replicatedJobs"]
    job = job["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert job["parallelism"] == job["completions"] == hosts
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert container["args"] == TRAIN[1:], "no argument is read as YAML"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-spot": "true",
        "cloud.google.com/gke-tpu-topology": topology.split(":")[1],
    }


@pytest.mark.parametrize("change", [
    lambda m: m["spec"].update(replicatedJob=[]),
    lambda m: m["spec"]["replicatedJobs"][0].pop("name"),
    lambda m: m["spec"]["replicatedJobs"][0]["template"]["spec"].update(parallelism="four"),
    lambda m: m["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"].update(restartpolicy="Never"),
    lambda m: m["spec"]["failurePolicy"]["rules"][0].pop("action"),
])  # fmt: skip
def test_the_schema_refuses_what_is_no_jobset(change):
    manifest = rendered("--topology", "v5e:8x8", *TRAIN)
    change(manifest)
    with pytest.raises(ValueError):
        checked(manifest)


@pytest.mark.parametrize("arguments, message", [
    (["--topology", "v5e:8"], "--topology v5e:8 is unknown"), (["--topology", "v5p:4x4"], "v5p has three"),
    (["--topology", "v5e:3x3"], "do not fill hosts"), (["--topology", "v4:2x2x2"], "--topology v4:2x2x2 is unknown"),
])  # fmt: skip
def test_a_wrong_topology_is_named(arguments, message):
    done = launch("gke_jobset.py", "--name", "x", "--image", "y", *arguments, *TRAIN)
    assert done.returncode == 2 and message in done.stderr
