"""A stand-in for the wandb package, put first on the wandb process's path; records its calls in a file.

What it should do wrong is said by the environment: ``FAKE_WANDB`` is a set of words.
"""

SOURCE = """
import json, os, time

FAULTS = set(os.environ.get("FAKE_WANDB", "").split())


def note(*what):
    with open(os.environ["FAKE_WANDB_CALLS"], "a") as file:
        file.write(json.dumps(what) + "\\n")


if "import" in FAULTS:
    raise ImportError("no such library")


class Settings:
    def __init__(self, **settings):
        self.settings = settings


class RunConfiguration:
    def update(self, values, allow_val_change=False):
        note("config", values, allow_val_change)


class Run:
    config = RunConfiguration()
    url = "https://wandb.example/run"

    def __init__(self, directory, offline):
        self.dir = directory + "/files"
        self.offline = offline

    def define_metric(self, *args, **kwargs):
        note("define_metric", args, kwargs)

    def log(self, record):
        if "log" in FAULTS:
            raise ConnectionResetError("Connection\\nlost")
        if "die" in FAULTS:
            os._exit(9)
        if "hang" in FAULTS:
            time.sleep(600)
        note("log", record)

    def finish(self, exit_code):
        if "finish" in FAULTS:
            raise TimeoutError("Timed out finishing run.")
        if "finish_hang" in FAULTS:
            time.sleep(600)
        note("finish", exit_code)


def init(settings, **kwargs):
    note("init", kwargs, settings.settings)
    note("environment", sorted(name for name in os.environ if name.startswith("WANDB_")))
    print("chatter that must not reach the pipe")
    if "init_hang" in FAULTS and kwargs["mode"] == "online":
        time.sleep(600)
    if "online" in FAULTS and kwargs["mode"] == "online":
        raise RuntimeError("No API key configured.\\nSecond line")
    if "offline" in FAULTS and kwargs["mode"] == "offline":
        raise RuntimeError("disk full")
    offline = kwargs["mode"] == "offline"
    return Run(f"{kwargs['dir']}/wandb/{'offline-run' if offline else 'run'}-1-{kwargs['id']}", offline)


def Table(columns, data):
    return {"table": [columns, *data]}


def teardown():
    note("teardown")
"""
