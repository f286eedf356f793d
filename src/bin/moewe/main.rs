//! `moewe`: runs one Mixture-of-Experts layer, and judges backends by golden cases and by fields that are dropped.

#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::todo,
        clippy::unimplemented,
        clippy::unreachable
    )
)]

use std::path::PathBuf;
use std::process::ExitCode;

use clap::builder::PossibleValuesParser;
use clap::{Args, Parser, Subcommand};

use crate::backends::{BackendName, Constraints};

mod ablate;
mod backends;
mod bench;
mod case_file;
mod cases;
mod chart;
mod check;
mod conformance;
mod doctor;
mod engine;
mod inputs;
mod inspect;
mod json;
mod judge;
mod metrics;
#[cfg(feature = "wgpu")]
mod pipelines;
mod progress;
mod reference_engine;
mod report;
mod run;
mod run_plot;
mod source;
mod spec_text;
mod svg;
mod tune;
mod verify;

/// Runs Mixture-of-Experts layers on GPUs and CPU, and checks them against one plain reference.
///
/// Without a command: `run`, on the small layer that is built in.
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: RunOptions,
}

#[derive(Subcommand)]
enum Command {
    /// Runs one layer on random tokens and compares it with the reference.
    ///
    /// Exit status: 0 it agrees, 1 it does not or something failed, 2 usage, 3 unsupported.
    #[command(after_help = RUN_EXAMPLES)]
    Run {
        /// A folder with config.json and *.safetensors or *.gguf; without it a small layer that is built in.
        #[arg(value_name = "CHECKPOINT_DIR")]
        checkpoint: Option<PathBuf>,
        #[command(flatten)]
        options: RunOptions,
    },
    /// Shows what each layer of a checkpoint computes, its tensors, and what every backend makes of it.
    ///
    /// Looks at config.json and the shards that are here; a layer without tensors here is no problem.
    /// Exit status: 0 every layer that is here can be computed, 1 a part of one is missing, misshapen or unreadable,
    /// 2 usage, 3 one is beyond every backend. Unknown keys and absent backends change nothing.
    #[command(after_help = "Example:\n  moewe inspect ~/models/DeepSeek-V3 --explain")]
    Inspect(InspectOptions),
    /// Runs golden cases and prints one JSON object a case.
    ///
    /// Exit status: 0 all passed, 1 any failed, 2 usage or no case found, 3 none failed but some are unsupported.
    #[command(after_help = "Example:\n  moewe verify tests/golden --backend wgpu")]
    Verify(VerifyOptions),
    /// Times layers of real models, with weights that are made on the device, and checks them first.
    ///
    /// Caller's logits, no shared expert, bf16 in and out. The floor is the time that the weights of the experts
    /// chosen take to be read at the rate measured in the same run (and, where the rate of a device's matrix units is
    /// known, that of the operations); the gap is the median time in floors. Exit status: 0 all passed, 1 any failed,
    /// 2 usage, 3 none failed but some are unsupported.
    #[command(after_help = BENCH_EXAMPLE)]
    Bench(BenchOptions),
    /// Measures which cut of the GEMMs is the fastest for calls of which size, and keeps it in a file.
    ///
    /// Each cut is checked, then timed, on the layers of `bench`; a bound between two cuts is given in rows of a matrix in
    /// the mean. What the file says of a problem and an adapter, `bench --tuning` and programs (`Tuning::cuts`) plan by.
    /// Exit status: 0 all measured, 1 a row is wrong or something failed, 2 usage, 3 unsupported.
    #[command(after_help = TUNE_EXAMPLE)]
    Tune(TuneOptions),
    /// Drops each field of the spec on purpose, and tells whether anybody notices.
    ///
    /// A backend has to match the reference on a witness of each field, or to refuse it by its name, and has to be
    /// found wrong once the field is dropped: from the lowering (lower), or from one step or table that carries it
    /// (carrier). Takes a minute or a few.
    /// Exit status: 0 each is killed or refused, 1 one survived or has no witness, 2 usage or no such device.
    #[command(after_help = "Example:\n  moewe conformance --backend wgpu --adapter NVIDIA --report conformance.md")]
    Conformance(ConformanceOptions),
    /// Examines every adapter: features and limits, whether each kernel is right there, bandwidth and dispatches.
    ///
    /// Runs small layers that together have every kernel which a layer could get on the adapter, and compares each
    /// step with its twin on the CPU and each layer with the reference. Takes about a minute with Mesa's software
    /// driver. The cpu backend is examined as well; --adapter cpu examines it alone.
    /// Exit status: 0 all is right, 1 a kernel is wrong or failed, 2 usage or no such adapter, 3 nothing is wrong but
    /// an adapter cannot run layers. A backend that is not in this build changes nothing.
    #[command(after_help = "Example:\n  moewe doctor --adapter NVIDIA")]
    Doctor(DoctorOptions),
}

const RUN_EXAMPLES: &str = "Examples: a layer on the best GPU, and what dropping two of its fields would have done:
  moewe run ~/models/DeepSeek-V3 --layer 3 --tokens 64 --backend wgpu --plot layer3.svg
  moewe run ~/models/DeepSeek-V3 --ablate routed_scaling_factor,e_score_correction_bias";
const BENCH_EXAMPLE: &str = "Example: a tenth of the experts of Qwen3-30B-A3B's layer, as a small machine has room for:
  moewe bench --case qwen3_30b_bf16 --tokens 1,16 --backend wgpu --scale 0.1";

const TUNE_EXAMPLE: &str = "Example:
  moewe tune --case qwen3_30b_fp8 --backend cuda --output tuning.jsonl";

/// Where the layer runs.
#[derive(Args)]
struct DeviceOptions {
    /// Where the layer runs. auto: a hardware adapter through wgpu, else cpu. wgpu: the best adapter, software included.
    #[arg(long, value_enum, default_value = "auto")]
    backend: BackendName,
    /// Part of the name or driver of the adapter to take, whatever the case. With auto it means wgpu.
    #[arg(long, value_name = "S")]
    adapter: Option<String>,
    /// Ask the adapter for WebGPU's default limits and no features, as the least of devices has.
    #[arg(long)]
    portable: bool,
    /// Cut weights into buffers of at most N bytes.
    #[arg(long, value_name = "N")]
    segment_bytes: Option<u64>,
    /// Keep wgpu's run-time checks, index clamps and loop bounds, in every kernel, also in those whose indices are proved.
    /// For a search after a fault: if something that was wrong is right with it, the proof is. Changes no result.
    #[arg(long)]
    checked: bool,
    /// Exit with 1 if config.json has keys that nobody knows.
    #[arg(long)]
    strict: bool,
}

impl DeviceOptions {
    fn constraints(&self) -> Constraints {
        Constraints {
            portable: self.portable,
            segment_bytes: self.segment_bytes,
            checked: self.checked,
            keep_pipelines: true,
        }
    }
}

#[derive(Args)]
struct RunOptions {
    /// Which layer; without it the first Mixture-of-Experts layer that is there.
    #[arg(long, value_name = "N")]
    layer: Option<usize>,
    /// How many tokens.
    #[arg(long, value_name = "T", default_value = "16", value_parser = tokens)]
    tokens: usize,
    #[command(flatten)]
    device: DeviceOptions,
    /// Seed of the random tokens.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Run-time quantisation of what quantised experts read: none; FP8 codes with scales of 128 columns
    /// (dynamic, dynamic-ue8m0 with powers of two), of 64 (dynamic-64), of a row (token), of a call (tensor) or of
    /// the checkpoint (static); INT8 codes with scales of a row (int8).
    #[arg(long, value_name = "SCHEME", default_value = "none")]
    activations: String,
    /// First look at every weight, and fail with the names of tensors that hold NaN or infinities.
    #[arg(long)]
    scan: bool,
    /// Say what dropping a field would have done to the output: names as configs or `spec` have them, or all. With
    /// list, print what can be dropped from this layer, and run nothing.
    #[arg(long, value_name = "FIELD,..", value_delimiter = ',')]
    ablate: Vec<String>,
    /// Draw which experts the tokens chose, and the time of each stage.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct InspectOptions {
    /// A folder with config.json and *.safetensors or *.gguf.
    #[arg(value_name = "CHECKPOINT_DIR")]
    checkpoint: PathBuf,
    /// Plan for calls of up to so many tokens.
    #[arg(long, value_name = "T", default_value = "16", value_parser = tokens)]
    tokens: usize,
    #[command(flatten)]
    device: InspectDevice,
    /// Run-time quantisation of what quantised experts read, as for `run`.
    #[arg(long, value_name = "SCHEME", default_value = "none")]
    activations: String,
    /// Say why each kernel was chosen.
    #[arg(long)]
    explain: bool,
    /// Print one JSON object a layer instead of text.
    #[arg(long)]
    json: bool,
}

/// Which adapter is asked, and as what.
#[derive(Args)]
struct InspectDevice {
    /// Part of the name or driver of the adapter to ask, whatever the case; without it the best.
    #[arg(long, value_name = "S")]
    adapter: Option<String>,
    /// Ask as if the adapter had WebGPU's default limits.
    #[arg(long)]
    portable: bool,
    /// Cut weights into buffers of at most N bytes.
    #[arg(long, value_name = "N")]
    segment_bytes: Option<u64>,
}

impl InspectDevice {
    fn constraints(&self) -> Constraints {
        Constraints { portable: self.portable, segment_bytes: self.segment_bytes, ..Constraints::NONE }
    }
}

#[derive(Args)]
struct VerifyOptions {
    /// Folders: of cases with a MANIFEST.json, or of one case with an io.safetensors.
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
    #[command(flatten)]
    device: DeviceOptions,
    /// Largest absolute error of outputs, instead of the tolerances of the cases.
    #[arg(long, value_name = "X", value_parser = tolerance)]
    atol: Option<f64>,
    /// One JSON object a line. This is the only format.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct BenchOptions {
    /// Which layers; all without it.
    #[arg(long, value_name = "NAME,..", value_delimiter = ',', default_values = bench::NAMES, hide_default_value = true,
        value_parser = PossibleValuesParser::new(bench::NAMES))]
    case: Vec<String>,
    /// How many tokens a call has.
    #[arg(long, value_name = "T,..", value_delimiter = ',', default_value = "1,16,64", value_parser = tokens)]
    tokens: Vec<usize>,
    /// What is timed. auto: a hardware adapter through wgpu, else cpu. wgpu: the best adapter, software included.
    #[arg(long, value_enum, default_value = "auto")]
    backend: BackendName,
    /// Part of the name or driver of the adapter to take, whatever the case. With auto it means wgpu.
    #[arg(long, value_name = "S")]
    adapter: Option<String>,
    /// Keep wgpu's run-time checks, index clamps and loop bounds, in every kernel, also in those whose indices are proved.
    /// For a search after a fault: if something that was wrong is right with it, the proof is. Changes no result.
    #[arg(long)]
    checked: bool,
    /// Share of a layer's experts to keep, above 0: at least two for each that a token chooses; widths stay.
    #[arg(long, value_name = "S", default_value = "1", value_parser = scale)]
    scale: f64,
    /// Plan by what this file, of `moewe tune`, says of the case on this adapter; as without it where it says nothing.
    #[arg(long, value_name = "FILE")]
    tuning: Option<PathBuf>,
    /// Print one JSON object a line instead of a table.
    #[arg(long)]
    json: bool,
    /// Draw gaps over tokens, beside the best that other engines did on an H100.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

#[derive(Args)]
struct TuneOptions {
    /// Which layers; all without it.
    #[arg(long, value_name = "NAME,..", value_delimiter = ',', default_values = bench::NAMES, hide_default_value = true,
        value_parser = PossibleValuesParser::new(bench::NAMES))]
    case: Vec<String>,
    /// Sizes of the calls that are timed.
    #[arg(long, value_name = "T,..", value_delimiter = ',', default_value = "1,4,16,64,256,1024,4096", value_parser = tokens)]
    tokens: Vec<usize>,
    /// What is timed. auto: a hardware adapter through wgpu, else cpu. wgpu: the best adapter, software included.
    #[arg(long, value_enum, default_value = "auto")]
    backend: BackendName,
    /// Part of the name or driver of the adapter to take, whatever the case. With auto it means wgpu.
    #[arg(long, value_name = "S")]
    adapter: Option<String>,
    /// Share of a layer's experts to keep, as for `bench`.
    #[arg(long, value_name = "S", default_value = "1", value_parser = scale)]
    scale: f64,
    /// File to keep the bounds in: entries of other problems and adapters in it stay.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Print one JSON object a case instead of a table.
    #[arg(long)]
    json: bool,
}

fn scale(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value <= 1.0 => Ok(value),
        Ok(_) => Err("a number above 0 and at most 1".into()),
        Err(error) => Err(error.to_string()),
    }
}

#[derive(Args)]
struct ConformanceOptions {
    /// What is tried. auto: a hardware adapter through wgpu, else cpu. wgpu: the best adapter, software included.
    #[arg(long, value_enum, default_value = "auto")]
    backend: BackendName,
    /// Part of the name or driver of the adapter to take, whatever the case. With auto it means wgpu.
    #[arg(long, value_name = "S")]
    adapter: Option<String>,
    /// Ask the adapter for WebGPU's default limits and no features, as the least of devices has.
    #[arg(long)]
    portable: bool,
    /// Print one JSON object a mutant instead of text.
    #[arg(long)]
    json: bool,
    /// Write a report in Markdown as well, which names GPU, driver and versions.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

#[derive(Args)]
struct DoctorOptions {
    /// Examine only what has this in its name or driver, whatever the case.
    #[arg(long, value_name = "S")]
    adapter: Option<String>,
    /// Ask each adapter for WebGPU's default limits and no features, and examine the kernels that remain.
    #[arg(long)]
    portable: bool,
    /// Print one JSON object an adapter instead of text.
    #[arg(long)]
    json: bool,
}

fn tokens(text: &str) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(0) => Err("at least 1 token".into()),
        Ok(tokens) if tokens > 1 << 24 => Err("at most 2^24 tokens".into()),
        Ok(tokens) => Ok(tokens),
        Err(error) => Err(error.to_string()),
    }
}

fn tolerance(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && value >= 0.0 => Ok(value),
        Ok(_) => Err("a finite number of at least 0".into()),
        Err(error) => Err(error.to_string()),
    }
}

/// How an invocation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Exit {
    Passed,
    Failed,
    Usage,
    Unsupported,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Passed => 0,
            Exit::Failed => 1,
            Exit::Usage => 2,
            Exit::Unsupported => 3,
        })
    }
}

fn main() -> ExitCode {
    let Cli { command, run } = Cli::parse();
    let exit = match command {
        None => run::run(None, &run),
        Some(Command::Run { checkpoint, options }) => run::run(checkpoint.as_deref(), &options),
        Some(Command::Inspect(options)) => inspect::inspect(&options),
        Some(Command::Verify(options)) => verify::verify(&options),
        Some(Command::Bench(options)) => bench::bench(&options),
        Some(Command::Tune(options)) => tune::tune(&options),
        Some(Command::Conformance(options)) => conformance::conformance(&options),
        Some(Command::Doctor(options)) => doctor::doctor(&options),
    };
    exit.into()
}
