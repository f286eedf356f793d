//! `moewe tune`: which cut of the GEMMs is the fastest for calls of which size, as a file.

use std::fmt::Write as _;
use std::path::Path;

use moewe::schedule::tuning::{Timed, Tuned, Tuning, bounds, problem};
use moewe::{Cut, Cuts, Error, MoeSpec, Options, Result};
use serde_json::json;

use crate::backends::{self, Choice, Constraints};
use crate::bench::{Bench, Places, checked, layer};
use crate::json::{Status, number};
use crate::progress::Bar;
use crate::report::{complain, to_stdout, warn};
use crate::{Exit, TuneOptions};

/// A cut that takes so many times as long as another is not tried in larger calls.
const HOPELESS: f64 = 3.0;

/// Measures the cases and prints what it found.
pub fn tune(options: &TuneOptions) -> Exit {
    let constraints = Constraints { keep_pipelines: true, ..Constraints::NONE };
    let choice = backends::choose(options.backend, options.adapter.as_deref(), constraints);
    warn(&choice.warnings);
    let mut sizes = options.tokens.clone();
    sizes.sort_unstable();
    sizes.dedup();
    let refused = |error: &Error| {
        complain(&error.to_string());
        match Status::of(error) {
            Status::Unsupported => Exit::Unsupported,
            Status::Pass | Status::Fail => Exit::Failed,
        }
    };
    let bench = match &choice.engine {
        Ok(engine) => engine.bench(),
        Err(error) => return refused(error),
    };
    match bench.and_then(|bench| measured(options, &choice, bench.as_ref(), &sizes)) {
        Ok(()) => Exit::Passed,
        Err(error) => refused(&error),
    }
}

fn measured(options: &TuneOptions, choice: &Choice, bench: &dyn Bench, sizes: &[usize]) -> Result<()> {
    let mut tuning = options.output.as_deref().map_or_else(|| Ok(Tuning::default()), read)?;
    let adapter = choice.adapter.as_deref().unwrap_or_default();
    let bar = Bar::new();
    for name in &options.case {
        let Some(spec) = layer(name, options.scale) else { continue };
        let calls = calls(bench, name, &spec, sizes, &bar)?;
        bar.clear();
        let sixteenths = bounds(&calls);
        let tuned =
            Tuned { backend: choice.backend.into(), adapter: adapter.into(), problem: problem(&spec), sixteenths };
        if options.json {
            to_stdout(&format!("{}\n", report(choice, name, options.scale, sizes, &calls, &tuned)));
        } else {
            to_stdout(&text(choice, name, sizes, &calls, sixteenths));
        }
        tuning.insert(tuned);
        if let Some(path) = &options.output {
            write(path, &tuning)?;
        }
    }
    Ok(())
}

/// What each size takes with each cut: the cuts of most rows first, which serve every size.
fn calls(bench: &dyn Bench, name: &str, spec: &MoeSpec, sizes: &[usize], bar: &Bar) -> Result<Vec<Timed>> {
    let mean = |tokens: usize| (tokens * spec.rows_per_token()) as f64 / spec.num_slots() as f64;
    let blank = |&tokens: &usize| Timed { mean_rows: mean(tokens), seconds: [None; Cut::ALL.len()] };
    let mut calls: Vec<Timed> = sizes.iter().map(blank).collect();
    let most = sizes.iter().copied().max().unwrap_or(1);
    let mut expected = Places::new();
    let mut last_steps = vec![];
    let all = (Cut::ALL.len() * sizes.len()) as u64;
    let mut done = 0;
    for (at, cut) in Cut::ALL.into_iter().enumerate().rev() {
        bar.at(&format!("{name}: weights for {}", cut.name()), done, all);
        let layer = bench.layer(spec, most, &Options { cuts: Cuts::only(cut), ..Options::AUTO })?;
        let Some(bucket) = layer.schedule().buckets.first() else { continue };
        // The same kernels as those of the cut before, whose times they have.
        let same = bucket.steps == last_steps;
        last_steps = bucket.steps.clone();
        if same && cut == Cut::Tiles {
            for call in &mut calls {
                call.seconds[at] = call.seconds[at + 1].take();
            }
            continue;
        }
        let (served, chunk) = (bucket.max_tokens, layer.schedule().chunk_tokens);
        for (call, &tokens) in calls.iter_mut().zip(sizes) {
            bar.at(&format!("{name}: {tokens} tokens, {}", cut.name()), done, all);
            done += 1;
            // Larger calls are left to another cut.
            if tokens.min(chunk) > served {
                break;
            }
            let found = checked(spec, layer.as_ref(), tokens, &mut expected)?;
            if let Some(complaint) = found.complaint {
                return Err(Error::invalid(
                    "rows",
                    format!("{name}, {tokens} tokens, {}: {complaint}", cut.name()),
                    "those of the reference",
                    "see what `moewe doctor` says of this device",
                ));
            }
            let seconds = found.median();
            call.seconds[at] = seconds;
            let best = call.seconds.iter().flatten().copied().fold(f64::INFINITY, f64::min);
            if seconds.is_some_and(|seconds| seconds > HOPELESS * best) {
                break;
            }
        }
    }
    Ok(calls)
}

fn text(choice: &Choice, name: &str, sizes: &[usize], calls: &[Timed], sixteenths: [u32; 5]) -> String {
    let mut text = format!("{name} on {}, us\n", choice.adapter.as_deref().unwrap_or(choice.backend));
    let _ = write!(text, "{:>7} {:>9}", "tokens", "mean rows");
    for cut in Cut::ALL {
        let _ = write!(text, " {:>10}", cut.name());
    }
    for (tokens, call) in sizes.iter().zip(calls) {
        let _ = write!(text, "\n{tokens:>7} {:>9.2}", call.mean_rows);
        for seconds in call.seconds {
            let shown = seconds.map_or_else(|| "-".into(), |seconds| format!("{:.1}", 1e6 * seconds));
            let _ = write!(text, " {shown:>10}");
        }
    }
    let _ = write!(text, "\n{:>17}", "up to mean rows");
    for most in sixteenths {
        let shown = if most == u32::MAX { "any".into() } else { format!("{:.1}", f64::from(most) / 16.0) };
        let _ = write!(text, " {shown:>10}");
    }
    text + "\n\n"
}

fn report(
    choice: &Choice,
    name: &str,
    scale: f64,
    sizes: &[usize],
    calls: &[Timed],
    tuned: &Tuned,
) -> serde_json::Value {
    let times = |call: &Timed| -> serde_json::Map<String, serde_json::Value> {
        let micros = |seconds: Option<f64>| json!(seconds.map(|seconds| number(1e6 * seconds)));
        Cut::ALL.iter().zip(call.seconds).map(|(&cut, seconds)| (cut.name().into(), micros(seconds))).collect()
    };
    let calls: Vec<_> = sizes
        .iter()
        .zip(calls)
        .map(|(tokens, call)| json!({"tokens": tokens, "mean_rows": number(call.mean_rows), "us": times(call)}))
        .collect();
    json!({
        "case": name,
        "backend": choice.backend,
        "adapter": choice.adapter,
        "scale": scale,
        "calls": calls,
        "tuning": tuned.json(),
    })
}

/// A file that is not there yet has no entries.
fn read(path: &Path) -> Result<Tuning> {
    match std::fs::read_to_string(path) {
        Ok(text) => Tuning::parse(&text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Tuning::default()),
        Err(error) => Err(unreadable(path, &error)),
    }
}

fn unreadable(path: &Path, error: &std::io::Error) -> Error {
    Error::invalid("tuning", format!("{}: {error}", path.display()), "a file", "name one that can be read and written")
}

fn write(path: &Path, tuning: &Tuning) -> Result<()> {
    let unfinished = path.with_extension("part");
    let written = std::fs::write(&unfinished, tuning.text()).and_then(|()| std::fs::rename(&unfinished, path));
    written.map_err(|error| unreadable(path, &error))
}

/// How calls of a case are cut by a file, for `bench`.
pub fn cuts(path: &Path, choice: &Choice, spec: &MoeSpec) -> Result<Option<Cuts>> {
    let text = std::fs::read_to_string(path).map_err(|error| unreadable(path, &error))?;
    Ok(Tuning::parse(&text)?.cuts(choice.backend, choice.adapter.as_deref().unwrap_or_default(), spec))
}
