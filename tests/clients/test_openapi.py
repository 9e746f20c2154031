"""schemathesis against /openapi.json: requests of all kinds, no 500, and answers that are what the document says."""

import json
import os
import pathlib
import re
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from conftest import running

SECONDS = int(os.environ.get("SCHEMATHESIS_SECONDS", "75"))
CHECKS = ("not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
          "response_schema_conformance,negative_data_rejection,unsupported_method,use_after_free,ensure_resource_availability")


def test_no_500_and_answers_as_documented(tmp_path):
    with running("--model-name", "tiny", "--context", "256", "--deadline", "20") as server:
        headers = {"content-type": "application/json"}
        post = lambda path, body: json.load(urllib.request.urlopen(
            urllib.request.Request(server.url + path, json.dumps(body).encode(), headers)))
        # Things that ids can name, so that more is tried than what is not there.
        session = post("/v1/sessions", {})["id"]
        post(f"/v1/sessions/{session}/generate", {"text": "Hello", "max_tokens": 4})
        capsule = post(f"/v1/sessions/{session}/snapshot", {"name": "here"})["id"]
        response = post("/v1/responses", {"input": "Hello", "max_output_tokens": 4})["id"]
        ids = [session, capsule, response, "tiny", "here", "nothing"]
        document = json.load(urllib.request.urlopen(f"{server.url}/openapi.json"))
        for path in document["paths"].values():
            for operation in path.values():
                # An id with a '#' in it ends its path there, which is then another one.
                operation["responses"]["405"] = {"$ref": "#/components/responses/E400"}
                for parameter in operation.get("parameters", []):
                    if parameter["in"] == "path":
                        parameter["schema"] = {"anyOf": [{"enum": ids}, {"type": "string", "minLength": 1}]}
        # Token ids that there are.
        refused = urllib.request.Request(f"{server.url}/detokenize", b'{"tokens": [4294967295]}', headers)
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(refused)
        vocabulary = int(re.search(r"vocabulary of (\d+)", error.value.read().decode())[1])
        document = json.loads(json.dumps(document).replace("4294967295", str(vocabulary - 1)))
        # This server asks for no keys; test_wire has those that are wrong.
        del document["security"], document["components"]["securitySchemes"]
        file = tmp_path / "openapi.json"
        file.write_text(json.dumps(document))
        program = pathlib.Path(sys.executable).parent / "schemathesis"
        done = subprocess.run(
            [program, "run", str(file), "--url", server.url, "--checks", CHECKS, "--seed", "20240607", "--generation-database", "none",
             "--phases", "examples,coverage,fuzzing", "--max-time", str(SECONDS), "--request-timeout", "30", "--continue-on-failure",
             # One worker: in Python 3.11 the parser that Hypothesis calls is not safe among threads.
             "--workers", "1", "--no-color"],
            cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS + 120)
        assert done.returncode == 0, done.stdout[-24_000:] + done.stderr[-2000:]
        print(done.stdout[-1500:])
        assert server.alive()
        assert server.metric("ampoule_engine_panics_total") == 0
