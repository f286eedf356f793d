//! The table of families in the README is what the code says. `MOEWE_BLESS=1` writes it anew.

use moewe::backend::cpu::Cpu;
use moewe::error::{Error, Unsupported};
use moewe::families::{Resolved, Support, resolve, support};
use moewe::reference::{self, Inputs};
use moewe::{Backend, Checkpoint, MoeSpec, supports};

use crate::family_specs::samples;
use crate::samples::{ANY, golden};

const BEGIN: &str = "<!-- families: made by the test family_support, MOEWE_BLESS=1 -->\n";
const END: &str = "<!-- families: end -->\n";

/// A layer of a family.
struct Example {
    family: &'static str,
    golden: bool,
    spec: MoeSpec,
    reference: moewe::Result<()>,
}

impl Example {
    fn of(checkpoint: &Checkpoint, resolved: &Resolved, golden: bool) -> Self {
        let weights = resolved.weights(checkpoint).unwrap();
        // A call without tokens checks what each call with some would.
        let inputs = Inputs { expert_hidden_states: Some(&[]), router_states: Some(&[]), ..Inputs::of(&[]) };
        let reference = reference::layer(&resolved.spec, &weights, inputs).map(|_| ());
        Self { family: resolved.family, golden, spec: resolved.spec.clone(), reference }
    }
}

fn examples() -> Vec<Example> {
    let mut found = vec![];
    for case in std::fs::read_dir(golden("")).unwrap() {
        let path = case.unwrap().path();
        // Router cases have no experts; other weight formats are another table.
        let Ok(checkpoint) = Checkpoint::open(&path) else { continue };
        let Ok(resolved) = resolve(&checkpoint, &ANY) else { continue };
        found.push(Example::of(&checkpoint, &resolved, true));
    }
    for sample in samples() {
        let checkpoint = sample.open();
        found.push(Example::of(&checkpoint, &resolve(&checkpoint, &ANY).unwrap(), false));
    }
    found
}

/// `yes`, or the fields that are refused.
fn cell<'a>(results: impl Iterator<Item = &'a moewe::Result<()>>) -> String {
    let refused: std::collections::BTreeSet<String> = results
        .filter_map(|result| result.as_ref().err())
        .map(|error| match error {
            Error::Unsupported(Unsupported { field, .. }) => format!("`{field}`"),
            other => panic!("{other}"),
        })
        .collect();
    match refused.is_empty() {
        true => "yes".into(),
        false => format!("refused: {}", refused.into_iter().collect::<Vec<_>>().join(", ")),
    }
}

fn table() -> String {
    let examples = examples();
    // WebGPU's default limits.
    let mut facts = Cpu::new().facts();
    (facts.backend, facts.max_binding_bytes) = ("wgpu", 128 << 20);
    let (cpu, wgpu) = (Cpu::new(), Cpu::like(facts));
    let mut table = String::from(
        "| Family | `model_type` | Models | Experts stored | tested with | reference | cpu | wgpu (Vulkan) | wgpu (Metal) | wgpu (DX12) |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
    );
    for Support { family, model_types, models, layouts } in support() {
        let ours: Vec<&Example> = examples.iter().filter(|example| example.family == family).collect();
        assert!(!ours.is_empty(), "no example of {family}");
        let on = |backend: &Cpu| -> Vec<moewe::Result<()>> {
            ours.iter().map(|example| supports(backend, &example.spec, 64)).collect()
        };
        let code: Vec<String> = model_types.iter().map(|name| format!("`{name}`")).collect();
        let reference = cell(ours.iter().map(|example| &example.reference));
        let vulkan = cell(on(&wgpu).iter());
        let translated = if vulkan == "yes" { "translated, not run" } else { &vulkan };
        let tested = if ours.iter().any(|example| example.golden) { "golden layer" } else { "sample" };
        table += &format!(
            "| {family} | {} | {} | {} | {tested} | {reference} | {} | {vulkan} | {translated} | {translated} |\n",
            code.join(", "),
            models.join("; "),
            layouts.join("; "),
            cell(on(&cpu).iter()),
        );
    }
    table
}

#[test]
fn the_table_of_families_is_what_the_code_says() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/README.md");
    let readme = std::fs::read_to_string(path).unwrap();
    let (before, rest) = readme.split_once(BEGIN).expect("the marker where the table begins");
    let (old, after) = rest.split_once(END).expect("the marker where the table ends");
    let table = table();
    if std::env::var_os("MOEWE_BLESS").is_some() {
        std::fs::write(path, format!("{before}{BEGIN}{table}{END}{after}")).unwrap();
    } else {
        assert!(old == table, "README.md has another table: MOEWE_BLESS=1 writes this one\n{table}");
    }
}

#[test]
fn families_have_names_and_types_of_their_own() {
    let rows = support();
    assert!(rows.is_sorted_by_key(|row| row.family));
    let mut types: Vec<&str> = rows.iter().flat_map(|row| row.model_types).copied().collect();
    let count = types.len();
    types.sort_unstable();
    types.dedup();
    assert_eq!(types.len(), count);
    assert!(types.iter().all(|name| !name.ends_with("_text")));
}
