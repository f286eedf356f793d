//! docs/CONFORMANCE.md is what the trials of `witnesses` came to, and has a row for each fault that other engines
//! are known for. `MOEWE_BLESS=1` writes it anew.

use std::collections::BTreeMap;
use std::path::Path;

use moewe::conformance::report::{Column, LEGEND, summary, table};

use crate::witnesses::{on_cpu, on_wgpu};

/// Faults of other engines, by the numbers that the tests `bug_NN_...` have. One without a test says why.
const FAULTS: [(&str, Option<&str>); 46] = [
    ("the limit reaches every GEMM, batched rows included", None),
    ("the shared expert is clamped by its own limit", None),
    ("the limit reaches every format and every backend", None),
    ("gate is bounded above, up on both sides", None),
    ("a clamp before silu is not one behind it", None),
    ("the routed scale reaches every routing method", None),
    ("the routed scale acts once, and never on the shared expert", None),
    ("one expert a token, with a routed scale", None),
    ("a biased score is no weight", None),
    ("a large bias does not cancel a small score", None),
    ("the selection bias stays f32", None),
    ("the bias that the weights hold is the one that is used", None),
    ("types of logits and the flag of the norm are heeded", None),
    ("groups are excluded by membership, not by a score of 0", None),
    ("a bias is heeded without groups and without shared experts", None),
    ("keys that are all negative select distinct experts", None),
    ("a row of NaN selects distinct experts in range", None),
    ("ties break alike in every kernel", None),
    ("softmax over all is not softmax over the chosen", None),
    ("groups that do not divide the experts are no other routing", None),
    ("products of sizes beyond 31 bits", None),
    ("the same with weights of 4 bits", None),
    ("interleaved gate and up are not halves", None),
    ("a wrong layout hides behind no absolute tolerance", None),
    ("MXFP4 exponents from the largest value, ties to even", None),
    ("a scale rounded to a power of two stays so, fused or not", None),
    ("gate and up have global scales of their own", None),
    ("sizes that end inside a block of scales", None),
    ("what stands in rows of padding is not read", None),
    ("the output is dense, in its type, and nothing else is written", None),
    ("an id of -1 reads no memory", None),
    ("experts on other devices", None),
    ("no step reads what another has not written yet", None),
    ("lists of rows end where they end", None),
    ("one expert twice in a row", None),
    ("tails, down to a single column", None),
    ("every path computes one layer", None),
    ("the shared expert once over all devices", None),
    ("the shared expert beside the routed ones, fused or not", None),
    ("the shared expert with its gate is there", None),
    ("partial sums over experts stay f32", None),
    ("every number of tokens", None),
    ("weights stand beside their ids", None),
    ("the router's logits stay f32", None),
    ("offsets of fused kernels beyond 31 bits", None),
    ("the chosen are removed by id, not by a value", None),
];

/// Names of the tests of each fault, from the sources of this suite.
fn tests_of() -> BTreeMap<usize, Vec<String>> {
    let mut found: BTreeMap<usize, Vec<String>> = BTreeMap::new();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/suite");
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "rs") {
            continue;
        }
        let file = syn::parse_file(&std::fs::read_to_string(&path).unwrap()).unwrap();
        for item in file.items {
            let syn::Item::Fn(item) = item else { continue };
            let name = item.sig.ident.to_string();
            let Some(rest) = name.strip_prefix("bug_") else { continue };
            assert!(item.attrs.iter().any(|attribute| attribute.path().is_ident("test")), "{name} is no test");
            // bug_29_and_33_...
            let numbers = rest.split('_').take_while(|word| *word == "and" || word.parse::<usize>().is_ok());
            for number in numbers.filter_map(|word| word.parse().ok()) {
                let module = path.file_stem().unwrap().to_str().unwrap();
                found.entry(number).or_default().push(format!("`{module}::{name}`"));
            }
        }
    }
    found.values_mut().for_each(|names| names.sort());
    found
}

fn faults() -> String {
    let tests = tests_of();
    assert!(tests.keys().all(|number| (1..=FAULTS.len()).contains(number)), "{tests:?}");
    let mut text = String::from("| no. | fault of another engine | tests |\n|---|---|---|\n");
    for (at, (fault, reason)) in FAULTS.iter().enumerate() {
        let cell = match (tests.get(&(at + 1)), reason) {
            (Some(names), _) => names.join(", "),
            (None, Some(reason)) => (*reason).to_owned(),
            (None, None) => panic!("fault {} ({fault}) has neither a test bug_{:02}_... nor a reason", at + 1, at + 1),
        };
        text += &format!("| {} | {fault} | {cell} |\n", at + 1);
    }
    text
}

fn document() -> String {
    let column = |title, outcomes, instead| Column { title, outcomes, instead };
    let columns = [column("cpu", on_cpu(), ""), column("wgpu", on_wgpu(), ""), column("cuda", &[], "needs a device")];
    format!(
        "# Conformance\n\n\
         Made by the test `conformance`, MOEWE_BLESS=1. `moewe conformance` makes the same table of your device.\n\n\
         ## No field of the spec is dropped\n\n{LEGEND}\n\
         - cpu: {}.\n- wgpu: {}.\n- cuda: behind a feature, and where this document is made there is no such device; `moewe conformance --backend cuda` makes\n  the table on one, and `cargo test --features suite-on-cuda` asks that nothing survives.\n\n{}\n\
         ## Faults known from other engines\n\n\
         Each row is a fault that an engine had and repaired, or has, with the tests that would find it here.\n\n{}",
        summary(on_cpu()),
        summary(on_wgpu()),
        table(&columns),
        faults()
    )
}

#[test]
fn the_document_is_what_the_trials_came_to() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/CONFORMANCE.md");
    let document = document();
    if std::env::var_os("MOEWE_BLESS").is_some() {
        std::fs::write(path, &document).unwrap();
        return;
    }
    let old = std::fs::read_to_string(path).unwrap().replace("\r\n", "\n");
    for (old, new) in old.lines().zip(document.lines()) {
        assert_eq!(old, new, "docs/CONFORMANCE.md says something else: MOEWE_BLESS=1 writes it anew");
    }
    assert!(old == document, "docs/CONFORMANCE.md has another length: MOEWE_BLESS=1 writes it anew");
}

#[test]
fn every_fault_known_from_other_engines_has_a_test_or_a_reason() {
    assert_eq!(faults().lines().count(), FAULTS.len() + 2);
}
