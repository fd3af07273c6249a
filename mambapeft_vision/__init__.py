from mambapeft_vision.utils.startup import drop_unusable_backend

drop_unusable_backend()  # before anything imports matplotlib, as Lightning does
