//! What `moewe doctor` prints of one adapter: text, or one JSON object.

use std::fmt::Write as _;

use moewe::conformance::answers::{Answers, Kernel};
use serde_json::{Value, json};

use super::{Fact, Found, Health, Subject};
use crate::bench::{experts_of_a_token, layer};
use crate::json::{Status, number};

/// What is known before anything ran.
pub fn heading(subject: &Subject<'_>) -> String {
    let Subject { backend, adapter: _, name, api, driver, kind, software: _, features, limits } = subject;
    let mut text = format!("== {name}\n");
    let on = api.as_ref().map_or_else(String::new, |api| format!(" on {api}"));
    let _ = writeln!(text, "backend      {backend}{on}");
    for (label, value) in [("driver", driver.as_deref()), ("type", Some(*kind))] {
        let _ = value.map(|value| writeln!(text, "{label:<12} {value}"));
    }
    for (title, facts) in [("features", features), ("limits", limits)] {
        if !facts.is_empty() {
            let _ = writeln!(text, "\n{title}");
        }
        for Fact { name, value: _, shown, meaning } in facts {
            let _ = writeln!(text, "  {name:<20} {shown:<11} {meaning}");
        }
    }
    text
}

/// What it came to.
pub fn findings(subject: &Subject<'_>, found: &Found) -> String {
    let mut text = String::new();
    if let Found::Examined(health) = found {
        let Health { answers, read_rate, flop_rate, dispatch, seconds } = health.as_ref();
        let judge = if subject.adapter.is_some() { "against their twins" } else { "in layers" };
        let title = format!("kernels {judge}");
        let _ = writeln!(text, "\n{title:<34} {:>6} {:>6} {:>9} {:>9}", "texts", "runs", "error", "tolerance");
        for Kernel { kernel, texts, runs, error, tolerance, complaint } in &answers.kernels {
            let figures = match (*tolerance == 0.0, *error == 0.0) {
                (true, true) => format!("{:>9} {:>9}", "exact", "exact"),
                (true, false) => format!("{error:>9} {:>9}", "exact"),
                (false, _) => format!("{error:>9.1e} {tolerance:>9.1e}"),
            };
            let verdict = if complaint.is_some() { "WRONG" } else { "ok" };
            let _ = writeln!(text, "  {kernel:<32} {texts:>6} {runs:>6} {figures}  {verdict}");
        }
        let Answers { kernels: _, layers, error, tolerance, worst: _, complaints } = answers;
        let verdict = if complaints.is_empty() { "ok" } else { "WRONG" };
        let whole = "whole layers against the reference";
        let _ = writeln!(text, "  {whole:<39} {layers:>6} {error:>9.1e} {tolerance:>9.1e}  {verdict}");
        let rate = read_rate.as_ref().map(|rate| format!("{:.1} GB/s, the best that a kernel reads", 1e-9 * rate));
        let flops = flop_rate.as_ref();
        let flops = flops.map(|rate| format!("{:.1} GFLOP/s, in the slowest of the GEMMs", 1e-9 * rate));
        let cost = dispatch.as_ref().map(|(cost, method)| {
            format!("{:.2} us, each waiting for the one before in one pass ({method})", 1e6 * cost)
        });
        let told = |measured: Result<String, &moewe::Error>| measured.unwrap_or_else(|error| format!("none: {error}"));
        let _ = writeln!(text, "\nbandwidth    {}\narithmetic   {}", told(rate), told(flops));
        let _ = writeln!(text, "dispatch     {}", told(cost));
        let _ = writeln!(text, "examined     in {seconds:.1} s");
    }
    text + &format!("verdict      {}\n\n", verdict(subject, found).join("\n             "))
}

/// In plain words, what matters most first.
fn verdict(subject: &Subject<'_>, found: &Found) -> Vec<String> {
    let health = match found {
        Found::Examined(health) => health,
        Found::CannotRun(reason) => return vec![format!("cannot run layers: {reason}")],
        Found::Absent(why) => return vec![why.clone()],
    };
    let Answers { kernels, layers, error: _, tolerance: _, worst: _, complaints: _ } = &health.answers;
    if !health.answers.right() {
        let wrong: Vec<_> = kernels.iter().filter(|kernel| kernel.complaint.is_some()).map(|k| k.kernel).collect();
        let what = if wrong.is_empty() { "whole layers".into() } else { wrong.join(", ") };
        let remedy = match subject.adapter {
            Some(_) => "please report this page, and take --backend cpu until it is repaired",
            None => "please report this page",
        };
        return vec![format!("wrong: {what} gave other answers than those known"), remedy.into()];
    }
    let mut told = vec![format!("right: all {} kernels gave the known answers, in {layers} layers", kernels.len())];
    if let (Ok(rate), Some(spec)) = (&health.read_rate, layer(EXAMPLE.0, 1.0)) {
        let (bytes, name) = (experts_of_a_token(&spec) as f64, EXAMPLE.1);
        let least = time(bytes / rate);
        told.push(format!("a token in {name} reads {:.1} MB of experts: {least} at least", 1e-6 * bytes));
    }
    if subject.software {
        told.push("it computes on the CPU: for tests, and where there is no GPU".into());
    }
    told
}

/// A layer to make a rate mean something.
const EXAMPLE: (&str, &str) = ("qwen3_30b_bf16", "a layer of Qwen3-30B-A3B in bf16");

fn time(seconds: f64) -> String {
    if seconds < 1e-3 { format!("{:.1} us", 1e6 * seconds) } else { format!("{:.1} ms", 1e3 * seconds) }
}

/// What was wrong, for standard error.
pub fn complaints(found: &Found) -> Vec<String> {
    match found {
        Found::Examined(health) => {
            let Answers { kernels, layers: _, error: _, tolerance: _, worst: _, complaints } = &health.answers;
            let of = |kernel: &Kernel| Some(format!("{}: {}", kernel.kernel, kernel.complaint.as_ref()?));
            kernels.iter().filter_map(of).chain(complaints.iter().cloned()).collect()
        }
        Found::CannotRun(reason) => vec![reason.clone()],
        Found::Absent(_) => vec![],
    }
}

/// One object.
pub fn json(subject: &Subject<'_>, found: &Found) -> Value {
    let Subject { backend, adapter, name, api, driver, kind, software, features, limits } = subject;
    let facts = |facts: &[Fact]| -> Vec<Value> {
        let one =
            |Fact { name, value, shown: _, meaning }: &Fact| json!({"name": name, "value": value, "meaning": meaning});
        facts.iter().map(one).collect()
    };
    let health = match found {
        Found::Examined(health) => Some(health.as_ref()),
        Found::CannotRun(_) | Found::Absent(_) => None,
    };
    let kernel = |Kernel { kernel, texts, runs, error, tolerance, complaint }: &Kernel| {
        json!({
            "kernel": kernel,
            "status": if complaint.is_some() { Status::Fail } else { Status::Pass }.word(),
            "reason": complaint,
            "texts": texts,
            "runs": runs,
            "worst_error": number(*error),
            "tolerance": number(*tolerance),
        })
    };
    let layers = |answers: &Answers| {
        let Answers { kernels: _, layers, error, tolerance, worst, complaints } = answers;
        json!({
            "status": if complaints.is_empty() { Status::Pass } else { Status::Fail }.word(),
            "reasons": complaints,
            "count": layers,
            "worst_error": number(*error),
            "tolerance": number(*tolerance),
            "worst": worst,
        })
    };
    let dispatch = health.and_then(|health| health.dispatch.as_ref().ok());
    json!({
        "backend": backend,
        "adapter": adapter,
        "name": name,
        "api": api,
        "driver": driver,
        "type": kind,
        "software": software,
        "status": found.status().unwrap_or(Status::Unsupported).word(),
        "reason": match found {
            Found::Absent(why) => Some(why.clone()),
            Found::Examined(_) | Found::CannotRun(_) => complaints(found).into_iter().next(),
        },
        "features": facts(features),
        "limits": facts(limits),
        "kernels": health.map_or(vec![], |health| health.answers.kernels.iter().map(kernel).collect::<Vec<_>>()),
        "layers": health.map(|health| layers(&health.answers)),
        "read_gb_s": health.and_then(|health| health.read_rate.as_ref().ok()).map(|rate| number(1e-9 * rate)),
        "gflop_s": health.and_then(|health| health.flop_rate.as_ref().ok()).map(|rate| number(1e-9 * rate)),
        "dispatch_us": dispatch.map(|(cost, _)| number(1e6 * cost)),
        "timing": dispatch.map(|(_, method)| method),
        "seconds": health.map(|health| number(health.seconds)),
        "verdict": verdict(subject, found).join("; "),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn examined(complaint: Option<String>) -> Found {
        let kernel =
            |kernel, error, tolerance, complaint| Kernel { kernel, texts: 2, runs: 9, error, tolerance, complaint };
        let answers = Answers {
            kernels: vec![kernel("permute/stable", 0.0, 0.0, None), kernel("norm/rms", 2e-7, 4e-6, complaint)],
            layers: 3,
            error: 1e-6,
            tolerance: 4e-5,
            worst: "top_k, 69 tokens".into(),
            complaints: vec![],
        };
        let lost = moewe::Error::DeviceLost { backend: "wgpu", operation: "timing".into() };
        Found::Examined(Box::new(Health {
            answers,
            read_rate: Ok(2.5e11),
            flop_rate: Ok(3e12),
            dispatch: Err(lost),
            seconds: 1.5,
        }))
    }

    fn subject() -> Subject<'static> {
        let fact = Fact { name: "f16", value: true.into(), shown: "yes".into(), meaning: "halves".into() };
        Subject {
            backend: "wgpu",
            adapter: Some("Some GPU (driver 1, vulkan)".into()),
            name: "Some GPU".into(),
            api: Some("vulkan".into()),
            driver: Some("driver 1".into()),
            kind: "a GPU",
            software: false,
            features: vec![fact],
            limits: vec![],
        }
    }

    #[track_caller]
    fn expect_all(text: &str, parts: &[&str]) {
        for part in parts {
            assert!(text.contains(part), "{part}:\n{text}");
        }
    }

    #[test]
    fn a_right_device_is_told_what_it_is_good_for() {
        let text = heading(&subject()) + &findings(&subject(), &examined(None));
        let kernels = ["permute/stable                        2      9     exact     exact  ok\n", "whole layers"];
        expect_all(&text, &["== Some GPU\nbackend      wgpu on vulkan", "f16                  yes         halves"]);
        expect_all(&text, &kernels);
        expect_all(
            &text,
            &[
                "250.0 GB/s",
                "arithmetic   3000.0 GFLOP/s",
                "dispatch     none: ",
                "right: all 2 kernels",
                "75.5 MB of experts: 302.0 us",
            ],
        );
        let line = json(&subject(), &examined(None));
        assert_eq!((&line["status"], &line["dispatch_us"]), (&"pass".into(), &Value::Null));
        assert!((line["read_gb_s"].as_f64().unwrap_or(0.0) - 250.0).abs() < 1e-9, "{line}");
    }

    #[test]
    fn a_wrong_kernel_is_named_everywhere() {
        let found = examined(Some("step norm of top_k: normed[3] is 1, its twin says 2".into()));
        assert_eq!(found.status(), Some(Status::Fail));
        let text = findings(&subject(), &found);
        expect_all(&text, &["4.0e-6  WRONG", "wrong: norm/rms gave other answers", "please report", "--backend cpu"]);
        let line = json(&subject(), &found);
        assert_eq!((&line["status"], &line["kernels"][1]["status"]), (&"fail".into(), &"fail".into()));
        expect_all(line["reason"].as_str().unwrap_or(""), &["norm/rms: step norm of top_k"]);
    }

    #[test]
    fn an_adapter_that_cannot_run_and_a_backend_that_is_not_built_are_listed() {
        let found = Found::CannotRun("max_storage_buffers_per_shader_stage is 4, 8 is needed".into());
        assert_eq!(found.status(), Some(Status::Unsupported));
        expect_all(&findings(&subject(), &found), &["cannot run layers: max_storage_buffers"]);
        let line = json(&subject(), &found);
        assert_eq!(
            (&line["status"], &line["kernels"], &line["layers"]),
            (&"unsupported".into(), &json!([]), &Value::Null)
        );
        let absent = Found::Absent("not in this build".into());
        assert_eq!((absent.status(), complaints(&absent).len()), (None, 0));
        expect_all(&findings(&subject(), &absent), &["not in this build"]);
    }
}
