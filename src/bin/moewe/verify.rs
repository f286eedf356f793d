//! `moewe verify`: golden cases, one JSON object a line.

use moewe::Result;
use serde_json::{Value, json};

use crate::backends::{self, Choice};
use crate::case_file::CaseFile;
use crate::cases::{self, Case};
use crate::engine::Engine;
use crate::json::{Status, number};
use crate::judge::{Allowance, Check, Verdict};
use crate::report::{complain, to_stdout, warn};
use crate::{Exit, VerifyOptions};

/// Multiplies wgpu's tolerances of weights and outputs. The manifest's figures are 8 times the error of an
/// f32 implementation whose exponential and division err by about an ulp. WGSL allows `exp(x)` an error
/// of 3 + 2|x| ulp and a division 2.5: 4 times 8 ulp is what a sigmoid at -13 may use up.
const WGPU_TOLERANCE_FACTOR: f64 = 4.0;
const _: () = assert!(WGPU_TOLERANCE_FACTOR <= 8.0);

/// Has a test of its own, and no line here.
const PRIMITIVE: &str = "primitive";

/// How many cases came to what.
#[derive(Default)]
struct Tally {
    lines: usize,
    failed: usize,
    unsupported: usize,
    unknown_keys: usize,
    /// Paths that are no cases.
    strays: usize,
}

/// Judges the cases of all paths.
pub fn verify(options: &VerifyOptions) -> Exit {
    let choice =
        backends::choose(options.device.backend, options.device.adapter.as_deref(), options.device.constraints());
    warn(&choice.warnings);
    let allowance = Allowance { factor: factor(choice.backend), atol: options.atol };
    let mut tally = Tally::default();
    for path in &options.paths {
        match cases::find(path) {
            Ok(cases) => cases.iter().for_each(|case| verify_case(case, &choice, allowance, &mut tally)),
            Err(error) => {
                complain(&error.to_string());
                tally.strays += 1;
            }
        }
    }
    tally.exit(options.device.strict)
}

fn factor(backend: &str) -> f64 {
    if backend == "wgpu" { WGPU_TOLERANCE_FACTOR } else { 1.0 }
}

impl Tally {
    fn exit(&self, strict: bool) -> Exit {
        let Self { lines, failed, unsupported, unknown_keys, strays } = *self;
        if failed > 0 {
            Exit::Failed
        } else if strays > 0 {
            Exit::Usage
        } else if lines == 0 {
            complain("no case found but those of kind primitive, which the test suite covers");
            Exit::Usage
        } else if strict && unknown_keys > 0 {
            complain("unknown keys in config.json, and --strict");
            Exit::Failed
        } else if unsupported > 0 {
            Exit::Unsupported
        } else {
            Exit::Passed
        }
    }
}

fn verify_case(case: &Case, choice: &Choice, allowance: Allowance, tally: &mut Tally) {
    if case.kind() == Some(PRIMITIVE) {
        return;
    }
    let file = CaseFile::open(&case.folder);
    let of_file = || file.as_ref().ok().map(CaseFile::kind);
    let kind = case.kind().or_else(of_file).map(str::to_owned);
    let verdict = match &choice.engine {
        Err(error) => Verdict::unjudged(error),
        Ok(engine) => judge(case, kind.as_deref(), file, engine.as_ref(), allowance),
    };
    let keys = &verdict.unknown_keys;
    warn(&keys.iter().map(|key| format!("{}: config.json: key {key} is unknown", case.name)).collect::<Vec<_>>());
    tally.lines += 1;
    tally.unknown_keys += keys.len();
    match verdict.status() {
        Status::Pass => {}
        Status::Fail => tally.failed += 1,
        Status::Unsupported => tally.unsupported += 1,
    }
    to_stdout(&format!("{}\n", line(case, kind.as_deref(), choice, &verdict)));
}

fn judge(
    case: &Case,
    kind: Option<&str>,
    file: Result<CaseFile>,
    engine: &dyn Engine,
    allowance: Allowance,
) -> Verdict {
    match (kind, file) {
        // Neither the manifest nor the file says what it is.
        (None, Err(error)) => Verdict::unjudged(&error),
        (kind, file) => Verdict::of(case, kind.unwrap_or(""), file, engine, allowance),
    }
}

fn line(case: &Case, kind: Option<&str>, choice: &Choice, verdict: &Verdict) -> Value {
    let check = |Check { name, error, tolerance }: &Check| json!({"name": name, "error": number(*error), "tolerance": number(*tolerance)});
    let worst = verdict.worst();
    json!({
        "name": case.name,
        "kind": kind,
        "backend": choice.backend,
        "adapter": choice.adapter,
        "status": verdict.status().word(),
        "reason": verdict.reason(),
        "worst_error": worst.map(|worst| number(worst.error)),
        "tolerance": worst.map(|worst| number(worst.tolerance)),
        "worst_check": worst.map(|worst| &worst.name),
        "checks": verdict.checks.iter().map(check).collect::<Vec<_>>(),
        "unknown_keys": verdict.unknown_keys,
    })
}
