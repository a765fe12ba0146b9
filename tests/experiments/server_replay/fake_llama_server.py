"""A fake of llama.cpp's server: its options, log and streams, and memory that grows with -c.

It answers a prompt of N tokens with N letters, and rejects prompts that do not fit the context.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BYTES_PER_TOKEN = 32768


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        count, tokens = body["max_tokens"], len(body["prompt"])
        fits = tokens + count <= CONTEXT
        self.send_response(200 if fits else 400)
        self.end_headers()
        if not fits:
            self.wfile.write(b'{"error": {"code": 400, "type": "exceed_context_size_error"}}')
            return
        for number in range(count):
            reason = "length" if number == count - 1 else None
            self._send({"choices": [{"text": "a", "finish_reason": reason}]})
        self._send({"choices": [], "usage": {"completion_tokens": count}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, event):
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    if "--version" in sys.argv:
        print("version: 1234 (abcdef)")
        sys.exit()
    values = dict(zip(sys.argv[1:], sys.argv[2:], strict=False))
    CONTEXT = int(values["-c"])
    held = bytearray(b"x") * (CONTEXT * BYTES_PER_TOKEN)
    print("load_tensors:   CPU_Mapped model buffer size =    10.00 MiB")
    print(f"llama_kv_cache:        CPU KV buffer size = {len(held) / 2**20:8.2f} MiB")
    print("sched_reserve:        CPU compute buffer size =     2.50 MiB")
    server = ThreadingHTTPServer(("127.0.0.1", int(values["--port"])), Handler)
    print(f"main: server is listening on http://127.0.0.1:{values['--port']}", flush=True)
    server.serve_forever()
