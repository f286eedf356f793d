//! `moewe conformance`. Every field on every backend is `witnesses`' matter, in its own process.

use std::collections::BTreeSet;

use super::{moewe, text};

#[test]
fn every_line_has_the_same_keys_and_the_report_names_what_ran() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("report.md");
    let said = moewe(["conformance", "--backend", "cpu", "--json", "--report", text(&path)]);
    assert_eq!((said.code, said.stderr.as_str()), (0, ""));
    let (mut fields, mut mutants) = (BTreeSet::new(), BTreeSet::new());
    for line in said.lines() {
        let keys: Vec<&String> = line.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["field", "mutant", "backend", "status", "witness", "reason"]);
        let word = |key: &str| line[key].as_str().unwrap().to_owned();
        assert_eq!(word("backend"), "cpu");
        assert!(["killed", "refused"].contains(&word("status").as_str()), "{line}");
        assert!(!word("witness").is_empty() && !word("reason").is_empty(), "{line}");
        fields.insert(word("field"));
        mutants.insert(word("mutant"));
    }
    assert_eq!(mutants, ["carrier", "lower"].map(String::from).into());
    assert_eq!(said.lines().len(), 2 * fields.len());
    let report = std::fs::read_to_string(&path).unwrap();
    for named in ["# Conformance of cpu", "GPU and driver: none", env!("CARGO_PKG_VERSION"), "`top_k`"] {
        assert!(report.contains(named), "{named}");
    }
    assert!(fields.iter().all(|field| report.contains(&format!("| `{field}` |"))));
}

#[test]
fn usage_is_2_and_found_before_anything_runs() {
    for (args, said_why) in [
        (&["conformance", "--backend", "reference"][..], "judges"),
        (&["conformance", "--backend", "cuda", "--adapter", "no such device"], "cuda does not support"),
        (&["conformance", "--backend", "cpu", "--report", "/nowhere/at/all"], "another path"),
        (&["conformance", "--backend", "wgpu", "--adapter", "no such adapter"], "wgpu"),
        (&["conformance", "--backend", "abacus"], "abacus"),
        (&["conformance", "stray"], "stray"),
    ] {
        let said = moewe(args);
        assert_eq!((said.code, said.stdout.as_str()), (2, ""), "{args:?}: {}", said.stderr);
        assert!(said.stderr.contains(said_why), "{args:?}: {}", said.stderr);
    }
    let help = moewe(["conformance", "--help"]);
    assert_eq!(help.code, 0);
    assert!(help.stdout.contains("Example:\n  moewe conformance"), "{}", help.stdout);
}
