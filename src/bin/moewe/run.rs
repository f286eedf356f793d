//! `moewe run`.

use std::path::Path;

use moewe::families::{self, Resolved};
use moewe::{Checkpoint, Error, Result};

use crate::backends::{self, BackendName, Choice};
use crate::chart;
use crate::check;
use crate::engine::{Engine, Work};
use crate::inputs::RandomTokens;
use crate::json::Status;
use crate::report::{self, Layer, Measured, Report};
use crate::source;
use crate::{Exit, RunOptions};

/// Runs one layer and prints what came of it.
pub fn run(folder: Option<&Path>, options: &RunOptions) -> Exit {
    let Choice { backend, adapter, passed_over, warnings, engine } =
        backends::choose(options.device.backend, options.device.adapter.as_deref(), options.device.constraints());
    report::warn(&warnings);
    let checkpoint =
        folder.map_or_else(|| "built in (golden case deepseek_v3)".into(), |path| path.display().to_string());
    let mut report = Report {
        status: Status::Pass,
        reason: None,
        backend,
        adapter,
        passed_over,
        checkpoint,
        tokens: options.tokens,
        seed: options.seed,
        layer: None,
        measured: None,
    };
    let outcome = fill(&mut report, folder, options, engine);
    match outcome {
        Err(error) => {
            report.status = Status::of(&error);
            report.reason = Some(error.to_string());
        }
        Ok(()) => {
            let comparison = report.measured.as_ref().and_then(|measured| measured.comparison.as_ref());
            report.reason = comparison.and_then(check::Comparison::complaint);
            report.status = if report.reason.is_some() { Status::Fail } else { Status::Pass };
        }
    }
    let unknown_keys = report.layer.as_ref().is_some_and(|layer| !layer.unknown_keys.is_empty());
    report.print(options.json);
    match report.status {
        _ if options.device.strict && unknown_keys => {
            report::complain("unknown keys in config.json, and --strict");
            Exit::Failed
        }
        Status::Pass => Exit::Passed,
        Status::Fail => Exit::Failed,
        Status::Unsupported => Exit::Unsupported,
    }
}

/// Writes into the report what is known, as far as it goes.
fn fill(
    report: &mut Report,
    folder: Option<&Path>,
    options: &RunOptions,
    engine: Result<Box<dyn Engine>>,
) -> Result<()> {
    let checkpoint = source::open(folder)?;
    let request = source::request(&checkpoint, options.layer, &options.activations)?;
    let resolved = families::resolve(&checkpoint, &request)?;
    let layer = Layer::of(&resolved);
    report::warn_of_unknown_keys(&layer.unknown_keys);
    report.layer = Some(layer);
    report.measured = Some(measure(&checkpoint, &resolved, options, engine?.as_ref())?);
    Ok(())
}

fn measure(
    checkpoint: &Checkpoint,
    resolved: &Resolved,
    options: &RunOptions,
    engine: &dyn Engine,
) -> Result<Measured, Error> {
    let spec = &resolved.spec;
    let weights = resolved.weights(checkpoint)?;
    let runner = engine.plan(spec, Work::Layer(&weights), options.tokens)?;
    let tokens = RandomTokens::draw(spec, options.tokens, options.seed)?;
    let outcome = runner.run(&tokens.first(options.tokens, spec.hidden_size))?;
    let comparison = match options.device.backend {
        // It would be compared with itself.
        BackendName::Reference => None,
        BackendName::Auto | BackendName::Cpu | BackendName::Wgpu | BackendName::Cuda => {
            Some(check::compare(spec, &weights, &tokens, options.tokens, &outcome)?)
        }
    };
    Ok(Measured {
        memory: runner.memory(),
        timing: runner.timing(options.tokens)?,
        comparison,
        tokens_per_expert: chart::count(&outcome.topk_ids, spec.router_outputs()),
    })
}
