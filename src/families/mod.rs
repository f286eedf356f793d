//! Families
