//! `moewe run`.

use std::path::Path;

use moewe::conformance::ablation::Ablation;
use moewe::families;
use moewe::weights::Damage;
use moewe::{Error, MoeSpec, MoeWeights, Result};

use crate::ablate::{self, Wanted};
use crate::backends::{self, BackendName, Choice};
use crate::chart;
use crate::check;
use crate::engine::{Engine, Work};
use crate::inputs::RandomTokens;
use crate::json::Status;
use crate::report::{self, Layer, Measured, Report, Routing};
use crate::source;
use crate::{Exit, RunOptions, svg};

/// Runs one layer and prints what came of it.
pub fn run(folder: Option<&Path>, options: &RunOptions) -> Exit {
    let Choice { backend, adapter, passed_over, warnings, engine, pipelines: _at_the_end } =
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
        damage: None,
        measured: None,
        effects: vec![],
    };
    let outcome = fill(&mut report, folder, options, engine);
    match outcome {
        Err(Stop::List(fields)) => {
            report::print_fields(&fields, options.json);
            return Exit::Passed;
        }
        Err(Stop::Usage(error)) => {
            report::complain(&error.to_string());
            return Exit::Usage;
        }
        Err(Stop::Failed(error)) => {
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
    let drawn = options.plot.as_ref().zip(report.picture()).is_none_or(|(path, picture)| svg::save(path, &picture));
    match report.status {
        _ if !drawn => Exit::Failed,
        _ if options.device.strict && unknown_keys => {
            report::complain("unknown keys in config.json, and --strict");
            Exit::Failed
        }
        Status::Pass => Exit::Passed,
        Status::Fail => Exit::Failed,
        Status::Unsupported => Exit::Unsupported,
    }
}

/// Why a layer is not run to its end.
enum Stop {
    /// Only the fields that could be dropped were asked for.
    List(Vec<Ablation>),
    /// The arguments and the layer do not fit.
    Usage(Error),
    /// Anything else.
    Failed(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// Writes into the report what is known, as far as it goes.
fn fill(
    report: &mut Report,
    folder: Option<&Path>,
    options: &RunOptions,
    engine: Result<Box<dyn Engine>>,
) -> Result<(), Stop> {
    let checkpoint = source::open(folder)?;
    let request = source::request(&checkpoint, options.layer, &options.activations)?;
    let resolved = families::resolve(&checkpoint, &request)?;
    let dropped = match ablate::wanted(&resolved.spec, &options.ablate).map_err(Stop::Usage)? {
        Wanted::List(fields) => return Err(Stop::List(fields)),
        Wanted::Drop(fields) => fields,
    };
    let layer = Layer::of(&resolved);
    report::warn_of_unknown_keys(&layer.unknown_keys);
    report.layer = Some(layer);
    let weights = resolved.weights(&checkpoint)?;
    if options.scan {
        let damage = weights.scan();
        let damaged = damage.first().map(|first| complaint(first, damage.len()));
        report.damage = Some(damage);
        damaged.map_or(Ok(()), Err)?;
    }
    let tokens = RandomTokens::draw(&resolved.spec, options.tokens, options.seed)?;
    report.measured = Some(measure(&resolved.spec, &weights, &tokens, options, engine?.as_ref())?);
    if !dropped.is_empty() {
        report.effects = ablate::effects(&resolved.spec, &weights, &tokens, options.tokens, &dropped)?;
    }
    Ok(())
}

/// The error that a scan ends with.
fn complaint(first: &Damage, tensors: usize) -> Error {
    let Damage { tensor, matrix, count, first: [row, col] } = first;
    let others = if tensors > 1 { format!("; {} more matrices have some", tensors - 1) } else { String::new() };
    Error::invalid(
        tensor.clone(),
        format!("{count} weights that are NaN or infinite, the first at row {row}, column {col} of {matrix}{others}"),
        "finite numbers",
        "the checkpoint is damaged: download or convert it again",
    )
}

fn measure(
    spec: &MoeSpec,
    weights: &MoeWeights<'_>,
    tokens: &RandomTokens,
    options: &RunOptions,
    engine: &dyn Engine,
) -> Result<Measured> {
    let runner = engine.plan(spec, Work::Layer(weights), options.tokens)?;
    let outcome = runner.run(&tokens.first(options.tokens, spec))?;
    let comparison = match options.device.backend {
        // It would be compared with itself.
        BackendName::Reference => None,
        BackendName::Auto | BackendName::Cpu | BackendName::Wgpu | BackendName::Cuda => {
            Some(check::compare(spec, weights, tokens, options.tokens, &outcome)?)
        }
    };
    Ok(Measured {
        memory: runner.memory(),
        decisions: runner.decisions(),
        timing: runner.timing(options.tokens)?,
        comparison,
        tokens_per_expert: chart::count(&outcome.topk_ids, spec.router_outputs()),
        routing: Routing {
            topk_ids: outcome.topk_ids,
            topk_weights: outcome.topk_weights,
            top_k: spec.top_k,
            num_experts: spec.num_experts,
        },
    })
}
