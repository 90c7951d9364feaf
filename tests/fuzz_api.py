"""schemathesis over the OpenAPI document: no 5xx, no answer that the document does not know. `make fuzz` runs it.

python tests/fuzz_api.py PATH_OF_ST [more of `st run`'s options]
"""

import sys

from support.fake_server import KEY, run_beside

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "negative_data_rejection,unsupported_method,use_after_free"
)

if __name__ == "__main__":
    options = ["-H", f"authorization: Bearer {KEY}", "--checks", CHECKS, "--continue-on-failure", *sys.argv[2:]]
    sys.exit(run_beside([sys.argv[1], "run", "{url}/openapi.json", *options]))
