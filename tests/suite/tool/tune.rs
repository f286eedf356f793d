//! `moewe tune`, and `moewe bench --tuning`.

use moewe::schedule::tuning::Tuning;
use serde_json::Value;

use super::{moewe, text};

/// Full widths, the fewest experts.
const SMALL: [&str; 6] = ["--case", "qwen3_30b_bf16", "--scale", "0.001", "--backend", "cpu"];

#[test]
fn each_cut_is_timed_and_the_bounds_are_kept_and_planned_by() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tuning.jsonl");
    let file = text(&path);
    let tune = |tokens: &str| {
        let said = moewe([&["tune"], &SMALL[..], &["--tokens", tokens, "--output", file, "--json"]].concat());
        assert_eq!(said.code, 0, "{}", said.stderr);
        said
    };
    let first = tune("1");
    let [line] = &first.lines()[..] else { panic!("{}", first.stdout) };
    assert_eq!(
        (&line["case"], &line["backend"], &line["adapter"]),
        (&"qwen3_30b_bf16".into(), &"cpu".into(), &Value::Null)
    );
    let [call] = &line["calls"].as_array().unwrap()[..] else { panic!("{line}") };
    assert_eq!((&call["tokens"], &call["mean_rows"]), (&1.into(), &0.5.into()));
    let cuts: Vec<_> = call["us"].as_object().unwrap().iter().collect();
    assert_eq!(
        cuts.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(),
        ["gemv", "pairs", "quads", "octets", "tiles", "full tiles"]
    );
    // Full tiles are tiles here.
    assert!(cuts[..5].iter().all(|(_, us)| us.as_f64().unwrap() > 0.0) && cuts[5].1.is_null(), "{call}");
    // The same problem again takes the place of its entry.
    tune("1");
    let kept = std::fs::read_to_string(&path).unwrap();
    assert_eq!(kept.lines().count(), 1);
    assert_eq!(
        kept.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()).next().unwrap()["format"],
        line["tuning"]["format"]
    );
    Tuning::parse(&kept).unwrap();

    // Without a bound for any cut but the last, one more kernel sorts the rows.
    let dispatches = |rest: &[&str]| {
        let said = moewe([&["bench"], &SMALL[..], &["--tokens", "1", "--json"], rest].concat());
        assert_eq!(said.code, 0, "{}", said.stderr);
        (said.lines()[0]["dispatches"].as_u64().unwrap(), said.stderr)
    };
    let (own, _) = dispatches(&[]);
    let mut entry: Value = serde_json::from_str(kept.trim()).unwrap();
    for (_, rows) in entry["up_to_mean_rows"].as_object_mut().unwrap() {
        *rows = 0.0.into();
    }
    std::fs::write(&path, entry.to_string()).unwrap();
    assert_eq!(dispatches(&["--tuning", file]), (own + 1, String::new()));
    // Another problem's entry changes nothing, and that is said.
    entry["problem"] = "another".into();
    std::fs::write(&path, entry.to_string()).unwrap();
    let (dispatched, said) = dispatches(&["--tuning", file]);
    assert!(dispatched == own && said.contains("tuning: nothing of this case"), "{dispatched}: {said}");
}

#[test]
fn files_that_are_none_are_errors_and_what_cannot_be_timed_is_unsupported() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tuning.jsonl");
    std::fs::write(&path, "{}\n").unwrap();
    let file = text(&path);
    let said = moewe([&["tune"], &SMALL[..], &["--output", file]].concat());
    assert!(said.code == 1 && said.stdout.is_empty() && said.stderr.contains("line 1"), "{}", said.stderr);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "{}\n");
    for (file, reason) in [(file, "line 1"), ("/nowhere/tuning.jsonl", "/nowhere/tuning.jsonl")] {
        let said = moewe([&["bench"], &SMALL[..], &["--tokens", "1", "--json", "--tuning", file]].concat());
        let line = &said.lines()[0];
        assert_eq!((said.code, &line["status"]), (1, &"fail".into()), "{line}");
        assert!(line["reason"].as_str().unwrap().contains(reason), "{line}");
    }
    let said = moewe(["tune", "--backend", "reference", "--case", "qwen3_30b_bf16", "--tokens", "1"]);
    assert!(said.code == 3 && said.stdout.is_empty(), "{}", said.stderr);
    assert_eq!(moewe(["tune", "--tokens", "0"]).code, 2);
}
