"""The check whether a node can log to W&B."""

import base64
import http.client
import json
import os
import urllib.request

from launch.check_results import PASSED, Finding
from train.runtime.keys import key_of, shown_url, wandb_status
from train.runtime.text_formats import parse_json

SECONDS = 10  # time limit of a request


def wandb_mode(mode: str) -> Finding:
    """Returns whether a run with this --wandb will be online. It never fails, since an offline run loses nothing."""
    if mode != "online":
        return Finding("W&B", PASSED, f"{mode}, as requested")
    hindrance = wandb_hindrance()
    return Finding("W&B", PASSED, f"offline: {hindrance}" if hindrance else "online")


def wandb_hindrance() -> str | None:
    """Returns why W&B cannot be used with the key in WANDB_API_KEY, None if it can."""
    _, key = key_of(["WANDB_API_KEY"])
    if not key:
        return "no WANDB_API_KEY"
    where = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    shown = shown_url(where)
    try:
        request = urllib.request.Request(
            f"{where.rstrip('/')}/graphql",
            data=json.dumps({"query": "query Viewer { viewer { username } }"}).encode(),
            headers={
                "Content-Type": "application/json",
                "Authorization": "Basic " + base64.b64encode(f"api:{key}".encode()).decode(),
            },
        )
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            viewer = (parse_json(answer.read(2**20).decode()).get("data") or {}).get("viewer")
    # No network, an invalid address, or an invalid answer.
    except (OSError, ValueError, AttributeError, http.client.HTTPException) as error:
        return f"{shown} cannot be reached ({wandb_status(error)})"
    return None if viewer else f"{shown} rejects the key in WANDB_API_KEY"
