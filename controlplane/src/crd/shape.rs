//! What a type reads: the tree of fields that its `Deserialize` asks for. It is found by deserializing from a source that
//! answers every question with the simplest value and notes the question.

use std::fmt;

use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, Error as _, MapAccess, SeqAccess,
    VariantAccess, Visitor, value::BorrowedStrDeserializer, value::Error,
};

/// The tree.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) enum Shape {
    /// Not yet asked about, or anything goes: a `serde_json::Value`.
    #[default]
    Any,
    Boolean,
    Integer,
    Number,
    Text,
    /// One of these words.
    OneOf(&'static [&'static str]),
    List(Box<Shape>),
    Map(Box<Shape>),
    /// Fields, in the order of the type.
    Object(Vec<(&'static str, Shape)>),
}

/// The shape of `T`.
///
/// # Panics
/// Where `T` refuses the simplest values: it then checks more than its shape, and cannot be described so.
pub(super) fn of<T: DeserializeOwned>() -> Shape {
    let mut shape = Shape::Any;
    let read: Result<T, Error> = T::deserialize(Probe(&mut shape));
    if let Err(error) = read {
        panic!("{}: {error}", std::any::type_name::<T>());
    }
    shape
}

/// The source. Writes what it was asked for.
struct Probe<'s>(&'s mut Shape);

macro_rules! answer {
    ($($method:ident: $shape:ident, $visit:ident($($value:expr)?);)*) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            *self.0 = Shape::$shape;
            visitor.$visit($($value)?)
        })*
    };
}

impl<'de> Deserializer<'de> for Probe<'_> {
    type Error = Error;

    answer! {
        deserialize_bool: Boolean, visit_bool(false);
        deserialize_i8: Integer, visit_i8(0);
        deserialize_i16: Integer, visit_i16(0);
        deserialize_i32: Integer, visit_i32(0);
        deserialize_i64: Integer, visit_i64(0);
        deserialize_u8: Integer, visit_u8(0);
        deserialize_u16: Integer, visit_u16(0);
        deserialize_u32: Integer, visit_u32(0);
        deserialize_u64: Integer, visit_u64(0);
        deserialize_f32: Number, visit_f32(0.0);
        deserialize_f64: Number, visit_f64(0.0);
        deserialize_str: Text, visit_borrowed_str("");
        deserialize_string: Text, visit_borrowed_str("");
        deserialize_any: Any, visit_unit();
        deserialize_ignored_any: Any, visit_unit();
        deserialize_unit: Any, visit_unit();
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let mut item = Shape::Any;
        let value = visitor.visit_seq(Once(Some(&mut item)));
        *self.0 = Shape::List(Box::new(item));
        value
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let mut entry = vec![("", Shape::Any)];
        let value = visitor.visit_map(Fields(&mut entry, 0));
        *self.0 = Shape::Map(Box::new(entry.remove(0).1));
        value
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let mut shapes = fields.iter().map(|name| (*name, Shape::Any)).collect();
        let value = visitor.visit_map(Fields(&mut shapes, 0));
        *self.0 = Shape::Object(shapes);
        value
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        words: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        *self.0 = Shape::OneOf(words);
        let first = words.first().ok_or_else(|| unsupported(&name))?;
        visitor.visit_enum(Word(first))
    }

    serde::forward_to_deserialize_any! {
        i128 u128 char bytes byte_buf unit_struct tuple tuple_struct identifier
    }
}

fn unsupported(what: &dyn fmt::Display) -> Error {
    Error::custom(format_args!("{what} has no shape here"))
}

struct Once<'s>(Option<&'s mut Shape>);

impl<'de> SeqAccess<'de> for Once<'_> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Error> {
        let item = self.0.take();
        item.map(|shape| seed.deserialize(Probe(shape))).transpose()
    }
}

/// Each field once; the number is of the next one.
struct Fields<'s>(&'s mut Vec<(&'static str, Shape)>, usize);

impl<'de> MapAccess<'de> for Fields<'_> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Error> {
        let Some((name, _)) = self.0.get(self.1) else {
            return Ok(None);
        };
        let key = BorrowedStrDeserializer::new(name);
        seed.deserialize(key).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let (_, shape) = &mut self.0[self.1];
        self.1 += 1;
        seed.deserialize(Probe(shape))
    }
}

struct Word(&'static str);

impl<'de> EnumAccess<'de> for Word {
    type Error = Error;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), Error> {
        let word = seed.deserialize(BorrowedStrDeserializer::new(self.0))?;
        Ok((word, self))
    }
}

impl<'de> VariantAccess<'de> for Word {
    type Error = Error;

    fn unit_variant(self) -> Result<(), Error> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, _: T) -> Result<T::Value, Error> {
        Err(unsupported(&self.0))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, _: V) -> Result<V::Value, Error> {
        Err(unsupported(&self.0))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Error> {
        Err(unsupported(&self.0))
    }
}
