"""Every error that lorazor raises on purpose.

LorazorError
├── SettingsError      settings that are unknown, out of range or contradict each other
│   ├── BudgetError        a number of sites, parameters or ranks that cannot be kept
│   └── BoundaryError      a boundary outside 0..L
├── AdapterError       an adapter folder or PEFT model that cannot be used
│   ├── UnsupportedAdapterError   not plain LoRA (PiSSA, IA3, ...), or more than DoRA can
│   └── BaseModelError            the adapter does not fit this base model
├── SelectionError     a selection that does not fit the adapter, or a broken selection file
├── DataError          a data file, row or column that cannot be used
├── MeasureError       a measurement that went wrong (NaN loss, metric without references)
│   └── RowsUnclearError   a module that does not say what belongs to which row of a batch
└── OutputError        a place that cannot be written to, or that already holds something

Messages say what was given, what is allowed and what to do next, on one line:
the command line prints them as they are and exits with status 1.
"""


class LorazorError(Exception):
    """Base of every deliberate lorazor error."""


class SettingsError(LorazorError):
    """Settings that are unknown, out of range or contradict each other."""


class BudgetError(SettingsError):
    """A number of sites, parameters or ranks that cannot be kept."""


class BoundaryError(SettingsError):
    """A boundary outside 0..L."""


class AdapterError(LorazorError):
    """An adapter folder or PEFT model that cannot be used."""


class UnsupportedAdapterError(AdapterError):
    """An adapter that is not plain LoRA, so that gate 0 is not the base model."""


class BaseModelError(AdapterError):
    """The adapter does not fit this base model."""


class SelectionError(LorazorError):
    """A selection that does not fit the adapter, or a broken selection file."""


class DataError(LorazorError):
    """A data file, row or column that cannot be used."""


class MeasureError(LorazorError):
    """A measurement that went wrong, such as a loss that is not a number."""


class RowsUnclearError(MeasureError):
    """A module that does not say which of its output belongs to which row of a batch."""


class OutputError(LorazorError):
    """A place that cannot be written to, or that already holds something."""
