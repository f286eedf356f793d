//! Reading `config.json`: every key that is read is noted, so that the others can be reported.
//!
//! Nothing has a default here. An absent key, an explicit null and a value are three different things.

use std::cell::RefCell;
use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::irrelevant;
use crate::error::{Error, Result, Unsupported};

/// Bound of every integer: far above any model, far below an overflow of the products that follow.
const MAX_INTEGER: usize = 1 << 24;
/// Bound of the number of layers.
const MAX_LAYERS: usize = 1 << 16;

/// One object of `config.json`.
pub(super) struct Config<'a> {
    /// `family NAME`, for refusals.
    owner: String,
    /// What stands before a key in messages: `quantization_config.` or nothing.
    path: &'static str,
    map: &'a Map<String, Value>,
    read: RefCell<BTreeSet<String>>,
}

impl<'a> Config<'a> {
    pub(super) fn new(family: &str, path: &'static str, map: &'a Map<String, Value>) -> Self {
        Self { owner: format!("family {family}"), path, map, read: RefCell::default() }
    }

    /// Keys that are neither read nor irrelevant, with their path.
    pub(super) fn unknown(&self, irrelevant: &[&[&str]]) -> Vec<String> {
        let read = self.read.borrow();
        let known = |key: &String| read.contains(key) || irrelevant.iter().any(|keys| keys.contains(&key.as_str()));
        self.map.keys().filter(|key| !known(key)).map(|key| self.name(key)).collect()
    }

    /// An integer of at least 1 under one of several spellings.
    pub(super) fn size(&self, keys: &[&'static str]) -> Result<usize> {
        let (key, value) = self.required(keys, "an integer of at least 1")?;
        self.integer(key, value, 1)
    }

    /// The number of layers, each of which becomes an entry of a list.
    pub(super) fn num_layers(&self) -> Result<usize> {
        let (key, value) = self.required(&["num_hidden_layers"], "an integer of at least 1")?;
        match self.integer(key, value, 1)? {
            layers if layers <= MAX_LAYERS => Ok(layers),
            _ => Err(self.wrong(key, value, &format!("at most {MAX_LAYERS} layers"))),
        }
    }

    /// An integer.
    pub(super) fn count(&self, key: &'static str) -> Result<usize> {
        let (key, value) = self.required(&[key], "an integer of at least 0")?;
        self.integer(key, value, 0)
    }

    /// An integer, if the key is there; null is not an integer.
    pub(super) fn optional_count(&self, key: &'static str, least: usize) -> Result<Option<usize>> {
        self.get(key).map(|value| self.integer(key, value, least)).transpose()
    }

    /// An integer or null, which is none at all.
    pub(super) fn nullable_count(&self, key: &'static str) -> Result<Option<usize>> {
        match self.required(&[key], "an integer of at least 0, or null")? {
            (_, Value::Null) => Ok(None),
            (key, value) => self.integer(key, value, 0).map(Some),
        }
    }

    pub(super) fn flag(&self, key: &'static str) -> Result<bool> {
        let (key, value) = self.required(&[key], "true or false")?;
        value.as_bool().ok_or_else(|| self.wrong(key, value, "true or false"))
    }

    /// A number that must be finite in f32, or null.
    pub(super) fn nullable_number(&self, key: &'static str) -> Result<Option<f32>> {
        match self.required(&[key], "a number or null")? {
            (_, Value::Null) => Ok(None),
            (key, value) => self.finite(key, value).map(Some),
        }
    }

    /// A number that must be finite in f32, if the key is there.
    pub(super) fn optional_number(&self, key: &'static str) -> Result<Option<f32>> {
        self.get(key).map(|value| self.finite(key, value)).transpose()
    }

    /// A bound of an activation. Absent, null, 0, negative and +inf mean that there is none.
    pub(super) fn limit(&self, key: &'static str) -> Result<Option<f32>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        if value.is_null() {
            return Ok(None);
        }
        let limit = number(value).ok_or_else(|| self.wrong(key, value, "a number or null"))?;
        // A bound beyond f32 bounds nothing; one below it would bound everything to 0.
        match limit as f32 {
            narrow if narrow.is_nan() => Err(self.wrong(key, value, "a number, or null for no limit")),
            _ if limit <= 0.0 => Ok(None),
            f32::INFINITY => Ok(None),
            0.0 => Err(self.wrong(key, value, "a limit within the range of f32")),
            narrow => Ok(Some(narrow)),
        }
    }

    /// A word, which must be one of `known`.
    pub(super) fn word(&self, key: &'static str, known: &[&'static str]) -> Result<&'static str> {
        let (key, value) = self.required(&[key], &known.join(" or "))?;
        self.one_of(key, value, known)
    }

    /// A word, which must be one of `known`, if the key is there.
    pub(super) fn optional_word(&self, key: &'static str, known: &[&'static str]) -> Result<Option<&'static str>> {
        self.get(key).map(|value| self.one_of(key, value, known)).transpose()
    }

    /// A list of words, each one of `known`, if the key is there.
    pub(super) fn words(&self, key: &'static str, known: &[&'static str]) -> Result<Option<Vec<&'static str>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let list = value.as_array().ok_or_else(|| self.wrong(key, value, "a list of words"))?;
        list.iter().map(|value| self.one_of(key, value, known)).collect::<Result<_>>().map(Some)
    }

    /// A list of integers or null, which is the empty list.
    pub(super) fn integers(&self, key: &'static str) -> Result<Vec<usize>> {
        match self.required(&[key], "a list of integers, or null")? {
            (_, Value::Null) => Ok(Vec::new()),
            (key, Value::Array(list)) => list.iter().map(|value| self.integer(key, value, 0)).collect(),
            (key, value) => Err(self.wrong(key, value, "a list of integers, or null")),
        }
    }

    /// The value of a key, whatever it is.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.read.borrow_mut().insert(key.to_owned());
        self.map.get(key)
    }

    /// A value that is read but has no implementation.
    pub(super) fn unsupported(&self, key: &str, value: &Value, because: impl Into<String>) -> Error {
        Error::Unsupported(Unsupported {
            backend: self.owner.clone().into(),
            field: self.name(key).into(),
            value: show(value),
            because: because.into().into(),
        })
    }

    /// Two values that contradict each other.
    pub(super) fn contradiction(&self, key: &str, found: impl Into<String>, expected: impl Into<String>) -> Error {
        Error::invalid(self.name(key), found.into(), expected.into(), "correct the key that is wrong in config.json")
    }

    /// A key that has to be there.
    pub(super) fn missing(&self, key: &str, expected: &str) -> Error {
        Error::invalid(
            self.name(key),
            "no such key",
            expected,
            "add the key with the model's value to config.json: it changes results, so no default is assumed",
        )
    }

    fn name(&self, key: &str) -> String {
        format!("{}{key}", self.path)
    }

    fn required(&self, keys: &[&'static str], expected: &str) -> Result<(&'static str, &'a Value)> {
        let mut first: Option<(&'static str, &'a Value)> = None;
        for &key in keys {
            let Some(value) = self.get(key) else { continue };
            match first {
                Some((other, meant)) if meant != value => {
                    let found = format!("{} beside {other} = {}", show(value), show(meant));
                    return Err(self.contradiction(key, found, "one value under both names"));
                }
                Some(_) => {}
                None => first = Some((key, value)),
            }
        }
        first.ok_or_else(|| self.missing(&keys.join(" or "), expected))
    }

    fn integer(&self, key: &str, value: &Value, least: usize) -> Result<usize> {
        let integer = value.as_u64().and_then(|value| usize::try_from(value).ok());
        match integer {
            Some(integer) if (least..=MAX_INTEGER).contains(&integer) => Ok(integer),
            Some(_) | None => Err(self.wrong(key, value, &format!("an integer from {least} to {MAX_INTEGER}"))),
        }
    }

    fn finite(&self, key: &str, value: &Value) -> Result<f32> {
        match number(value).map(|number| number as f32) {
            Some(number) if number.is_finite() => Ok(number),
            Some(_) | None => Err(self.wrong(key, value, "a number that is finite in f32")),
        }
    }

    fn one_of(&self, key: &str, value: &Value, known: &[&'static str]) -> Result<&'static str> {
        let word = value.as_str().ok_or_else(|| self.wrong(key, value, &known.join(" or ")))?;
        let found = known.iter().find(|known| **known == word).copied();
        found.ok_or_else(|| self.unsupported(key, value, format!("only {} is implemented", known.join(" or "))))
    }

    fn wrong(&self, key: &str, value: &Value, expected: &str) -> Error {
        Error::invalid(self.name(key), show(value), expected, "correct the key in config.json")
    }
}

/// The object that describes the text model, and the object around it if there is one.
pub(super) struct TextConfig<'a> {
    pub(super) text: &'a Map<String, Value>,
    pub(super) outer: Option<&'a Map<String, Value>>,
    /// What stands before a key of `text` in messages.
    pub(super) path: &'static str,
}

impl<'a> TextConfig<'a> {
    pub(super) fn of(map: &'a Map<String, Value>) -> Result<Self> {
        // A text model says its width at the top level; a multimodal one nests it.
        match map.get("text_config") {
            Some(Value::Object(text)) if !map.contains_key("hidden_size") => {
                Ok(Self { text, outer: Some(map), path: "text_config." })
            }
            Some(value) if !map.contains_key("hidden_size") => {
                Err(Error::invalid("text_config", show(value), "an object", "correct the key in config.json"))
            }
            Some(_) | None => Ok(Self { text: map, outer: None, path: "" }),
        }
    }

    /// The value of a key that may stand in either object.
    pub(super) fn either(&self, key: &'static str) -> Result<Option<&'a Value>> {
        match (self.text.get(key), self.outer.and_then(|outer| outer.get(key))) {
            (Some(inner), Some(outer)) if inner != outer => Err(Error::invalid(
                key,
                format!("{} beside text_config.{key} = {}", show(outer), show(inner)),
                "one value in both places",
                "correct the key that is wrong in config.json",
            )),
            (Some(value), _) | (None, Some(value)) => Ok(Some(value)),
            (None, None) => Ok(None),
        }
    }

    /// Keys of the outer object that say nothing we know of.
    pub(super) fn unknown(&self) -> Vec<String> {
        let Some(outer) = self.outer else { return Vec::new() };
        let config = Config::new("", "", outer);
        for key in ["model_type", "text_config", "quantization_config"] {
            config.get(key);
        }
        config.unknown(&[irrelevant::SHARED, irrelevant::MULTIMODAL])
    }
}

/// The JSON of a value, cut to a line.
pub(super) fn show(value: &Value) -> String {
    const MOST: usize = 80;
    let text = value.to_string();
    if text.chars().count() <= MOST { text } else { text.chars().take(MOST).chain("...".chars()).collect() }
}

/// A number, also one that JSON cannot hold: `"Infinity"` or `{"__float__": "Infinity"}`.
fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::String(word) => match word.to_ascii_lowercase().trim_start_matches('+') {
            "inf" | "infinity" => Some(f64::INFINITY),
            "-inf" | "-infinity" => Some(f64::NEG_INFINITY),
            "nan" => Some(f64::NAN),
            _ => None,
        },
        Value::Object(object) if object.len() == 1 => {
            object.get("__float__").filter(|word| word.is_string()).and_then(number)
        }
        Value::Object(_) | Value::Null | Value::Bool(_) | Value::Array(_) => None,
    }
}
