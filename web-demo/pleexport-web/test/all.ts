// One process for all: ONNX Runtime takes seconds to start.
import "./blob.test.js";
import "./conformance.test.js";
import "./download.test.js";
import "./http.test.js";
import "./json.test.js";
import "./ort.test.js";
import "./session.test.js";
import "./slots.test.js";
import "./text.test.js";
