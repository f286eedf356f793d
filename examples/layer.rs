//! One layer of a checkpoint, in ten lines: `cargo run --release --example layer [CHECKPOINT_DIR]`
//!
//! `moewe::host` (feature `cli`) opens the device and waits for it. A program with a device of its own: `embed.rs`.

use std::path::Path;

use moewe::families::{Request, resolve};
use moewe::host::{Limits, Session, adapters, open};
use moewe::reference::Inputs;
use moewe::spec::{ActivationQuant, FloatType};
use moewe::{Checkpoint, Options, Plan};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let sample = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/mixtral");
    let folder = std::env::args().nth(1).unwrap_or_else(|| sample.to_string());
    let (input, output, activations) = (FloatType::F32, FloatType::F32, ActivationQuant::None);

    let checkpoint = Checkpoint::open(Path::new(&folder))?;
    let layer = resolve(&checkpoint, &Request { layer: None, input, output, activations })?;
    let weights = layer.weights(&checkpoint)?;
    let adapter = adapters().into_iter().next().ok_or("no adapter")?;
    let plan = Plan::new(open(&adapter, Limits::Default)?, &layer.spec, &weights, 16, &Options::AUTO)?;
    let session = Session::new(plan, &layer.spec)?;
    let x = vec![0.5; 3 * layer.spec.hidden_size];
    let outcome = session.run(&Inputs::of(&x))?;
    println!("{} on {}: experts {:?}", layer.family, adapter.name, &outcome.topk_ids[..layer.spec.top_k]);
    Ok(())
}
