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
    path: String,
    map: &'a Map<String, Value>,
    read: RefCell<BTreeSet<String>>,
    /// Unknown keys of objects inside.
    nested: RefCell<Vec<String>>,
    notes: RefCell<Vec<String>>,
}

impl<'a> Config<'a> {
    pub(super) fn new(family: &str, path: &str, map: &'a Map<String, Value>) -> Self {
        Self {
            owner: format!("family {family}"),
            path: path.to_owned(),
            map,
            read: RefCell::default(),
            nested: RefCell::default(),
            notes: RefCell::default(),
        }
    }

    /// Reads the object under a key, whose other keys are reported as this one's are.
    pub(super) fn object<T>(
        &self,
        key: &'static str,
        irrelevant: &[&str],
        read: impl FnOnce(&Config<'a>) -> Result<T>,
    ) -> Result<T> {
        let (key, value) = self.required(&[key], "an object")?;
        self.inner(key, value, irrelevant, read)
    }

    /// Reads each object in the object under a key.
    pub(super) fn objects<T>(
        &self,
        key: &'static str,
        irrelevant: &[&str],
        read: impl Fn(&Config<'a>) -> Result<T>,
    ) -> Result<Vec<T>> {
        let (key, value) = self.required(&[key], "an object of objects")?;
        let map = value.as_object().ok_or_else(|| self.wrong(key, value, "an object of objects"))?;
        map.iter().map(|(name, value)| self.inner(&format!("{key}.{name}"), value, irrelevant, &read)).collect()
    }

    fn inner<T>(
        &self,
        key: &str,
        value: &'a Value,
        irrelevant: &[&str],
        read: impl FnOnce(&Config<'a>) -> Result<T>,
    ) -> Result<T> {
        let map = value.as_object().ok_or_else(|| self.wrong(key, value, "an object"))?;
        let mut config = Config::new("", &format!("{}{key}.", self.path), map);
        config.owner.clone_from(&self.owner);
        let result = read(&config)?;
        self.nested.borrow_mut().extend(config.unknown(&[irrelevant::SHARED, irrelevant]));
        self.notes.borrow_mut().extend(config.notes());
        Ok(result)
    }

    /// What a reader of the result should know.
    pub(super) fn note(&self, note: impl Into<String>) {
        self.notes.borrow_mut().push(note.into());
    }

    /// All notes so far.
    pub(super) fn notes(&self) -> Vec<String> {
        self.notes.borrow().clone()
    }

    /// A key that other programs read and the family's own code does not: a note unless its value is neutral.
    pub(super) fn ignored(&self, key: &'static str, neutral: &[Value]) {
        let Some(value) = self.get(key) else { return };
        if !value.is_null() && !neutral.contains(value) {
            self.note(format!(
                "{} = {} is not applied: the model's own code does not read it",
                self.name(key),
                show(value)
            ));
        }
    }

    /// A key of which only one value is implemented. Absent means that value, and so does null where the value is
    /// false or 0.
    pub(super) fn fixed(&self, key: &'static str, only: impl Into<Value>) -> Result<()> {
        let only = only.into();
        let Some(value) = self.get(key) else { return Ok(()) };
        let off = only == Value::Bool(false) || only.as_u64() == Some(0);
        let equal = match (value.as_f64(), only.as_f64()) {
            (Some(value), Some(only)) => value == only,
            (Some(_) | None, _) => *value == only,
        };
        if equal || (off && value.is_null()) {
            return Ok(());
        }
        Err(self.unsupported(key, value, format!("only {} is implemented", show(&only))))
    }

    /// Whether a key is in one of these lists and nobody read it.
    pub(super) fn is_irrelevant(&self, key: &str, irrelevant: &[&[&str]]) -> bool {
        !self.read.borrow().contains(key) && irrelevant.iter().any(|keys| keys.contains(&key))
    }

    /// Keys that are neither read nor irrelevant, with their path.
    pub(super) fn unknown(&self, irrelevant: &[&[&str]]) -> Vec<String> {
        let read = self.read.borrow();
        let known = |key: &String| read.contains(key) || irrelevant.iter().any(|keys| keys.contains(&key.as_str()));
        let here = self.map.keys().filter(|key| !known(key)).map(|key| self.name(key));
        here.chain(self.nested.borrow().iter().cloned()).collect()
    }

    /// An integer of at least 1 under one of several spellings.
    pub(super) fn size(&self, keys: &[&'static str]) -> Result<usize> {
        let (key, value) = self.required(keys, "an integer of at least 1")?;
        self.integer(key, value, 1)
    }

    /// The number of layers, each of which becomes an entry of a list.
    pub(super) fn num_layers(&self) -> Result<usize> {
        self.layers(&["num_hidden_layers"])
    }

    /// The number of layers under one of several spellings.
    pub(super) fn layers(&self, keys: &[&'static str]) -> Result<usize> {
        let (key, value) = self.required(keys, "an integer of at least 1")?;
        match self.integer(key, value, 1)? {
            layers if layers <= MAX_LAYERS => Ok(layers),
            _ => Err(self.wrong(key, value, &format!("at most {MAX_LAYERS} layers"))),
        }
    }

    /// An integer under one of several spellings.
    pub(super) fn count(&self, keys: &[&'static str]) -> Result<usize> {
        let (key, value) = self.required(keys, "an integer of at least 0")?;
        self.integer(key, value, 0)
    }

    /// An integer, if the key is there; null is not an integer.
    pub(super) fn optional_count(&self, key: &'static str, least: usize) -> Result<Option<usize>> {
        self.get(key).map(|value| self.integer(key, value, least)).transpose()
    }

    /// An integer or null, which is none at all.
    pub(super) fn nullable_count(&self, keys: &[&'static str]) -> Result<Option<usize>> {
        match self.required(keys, "an integer of at least 0, or null")? {
            (_, Value::Null) => Ok(None),
            (key, value) => self.integer(key, value, 0).map(Some),
        }
    }

    /// An integer; absent and null both mean none.
    pub(super) fn any_count(&self, keys: &[&'static str]) -> Result<Option<usize>> {
        match self.found(keys)? {
            None | Some((_, Value::Null)) => Ok(None),
            Some((key, value)) => self.integer(key, value, 0).map(Some),
        }
    }

    /// An integer that may be negative, with the spelling that was found.
    pub(super) fn signed(&self, keys: &[&'static str]) -> Result<(&'static str, i64)> {
        let (key, value) = self.required(keys, "an integer")?;
        value.as_i64().map(|integer| (key, integer)).ok_or_else(|| self.wrong(key, value, "an integer"))
    }

    /// An integer that may be negative, if the key is there.
    pub(super) fn optional_signed(&self, key: &'static str) -> Result<Option<i64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_i64().map(Some).ok_or_else(|| self.wrong(key, value, "an integer"))
    }

    pub(super) fn flag(&self, keys: &[&'static str]) -> Result<bool> {
        let (key, value) = self.required(keys, "true or false")?;
        value.as_bool().ok_or_else(|| self.wrong(key, value, "true or false"))
    }

    /// True or false, if the key is there.
    pub(super) fn optional_flag(&self, key: &'static str) -> Result<Option<bool>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.wrong(key, value, "true or false"))
    }

    /// A number that must be finite in f32.
    pub(super) fn number(&self, keys: &[&'static str]) -> Result<f32> {
        let (key, value) = self.required(keys, "a number")?;
        self.finite(key, value)
    }

    /// A number that must be finite in f32, or null.
    pub(super) fn nullable_number(&self, keys: &[&'static str]) -> Result<Option<f32>> {
        match self.required(keys, "a number or null")? {
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
        self.get(key).map_or(Ok(None), |value| self.one_limit(key, value))
    }

    /// A bound for each layer. Absent and null mean that there is none.
    pub(super) fn limits(&self, key: &'static str) -> Result<Option<Vec<Option<f32>>>> {
        match self.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Array(list)) => {
                list.iter().map(|value| self.one_limit(key, value)).collect::<Result<_>>().map(Some)
            }
            Some(value) => Err(self.wrong(key, value, "a list of numbers, one a layer, or null")),
        }
    }

    fn one_limit(&self, key: &str, value: &Value) -> Result<Option<f32>> {
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

    /// A list of words, each one of `known`; absent and null mean none.
    pub(super) fn words(&self, key: &'static str, known: &[&'static str]) -> Result<Option<Vec<&'static str>>> {
        let Some(value) = self.get(key).filter(|value| !value.is_null()) else { return Ok(None) };
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

    /// A list of integers; absent and null mean none.
    pub(super) fn any_integers(&self, key: &'static str) -> Result<Option<Vec<usize>>> {
        match self.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(_) => self.integers(key).map(Some),
        }
    }

    /// A list of true and false, or of 1 and 0; absent and null mean none.
    pub(super) fn any_flags(&self, key: &'static str) -> Result<Option<Vec<bool>>> {
        let one = |value: &Value| match (value.as_bool(), value.as_u64()) {
            (Some(flag), _) => Ok(flag),
            (None, Some(0)) => Ok(false),
            (None, Some(1)) => Ok(true),
            (None, _) => Err(self.wrong(key, value, "a list of 0 and 1, or of false and true")),
        };
        match self.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Array(list)) => list.iter().map(one).collect::<Result<_>>().map(Some),
            Some(value) => Err(self.wrong(key, value, "a list of 0 and 1, one a layer")),
        }
    }

    /// An integer of at least 1, or one for each layer.
    pub(super) fn size_by_layer(&self, keys: &[&'static str], layers: usize) -> Result<Vec<usize>> {
        match self.required(keys, "an integer of at least 1, or a list of them")? {
            (key, Value::Array(list)) if list.len() == layers => {
                list.iter().map(|value| self.integer(key, value, 1)).collect()
            }
            (key, Value::Array(list)) => {
                let found = format!("{} entries", list.len());
                Err(self.contradiction(key, found, format!("num_hidden_layers = {layers}")))
            }
            (key, value) => self.integer(key, value, 1).map(|size| vec![size; layers]),
        }
    }

    /// Whether a key is there and not null.
    pub(super) fn has(&self, key: &str) -> bool {
        self.get(key).is_some_and(|value| !value.is_null())
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
        self.found(keys)?.ok_or_else(|| self.missing(&keys.join(" or "), expected))
    }

    /// The value under the first spelling that is there; the others must agree with it.
    fn found(&self, keys: &[&'static str]) -> Result<Option<(&'static str, &'a Value)>> {
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
        Ok(first)
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

    /// A value of the wrong type or out of range.
    pub(super) fn wrong(&self, key: &str, value: &Value, expected: &str) -> Error {
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
